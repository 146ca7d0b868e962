//! The one error of the runtime: a code, a message, and what to do about it.
//!
//! User code and the sites of a model return candle's error, so an [`Error`] often travels through a [`candle_core::Error`] and back.
//! It keeps its code, message and help on the way, also through candle's `.context(..)`, `.with_path(..)` and `.bt()`, and through
//! `candle_core::Error::wrap` and `msg`, which keep nothing but the text.

use std::fmt;

use autosp_plan::codes::{self, Code};
use autosp_plan::settings::SettingsError;
use serde_json::{Value, json};

/// What can go wrong, as `autosp::Result`.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error with a code that `cargo autosp explain` knows.
///
/// Printed as its message, then a line of help if there is one, then the code:
/// ```
/// use autosp_plan::codes;
/// use autosp_runtime::Error;
///
/// let error = Error::new(codes::MESH, "expected at least 1 rank, found 0").with_help("--sp 4");
/// assert_eq!(error.to_string(), "expected at least 1 rank, found 0\n  help: --sp 4 [AS0301]");
/// ```
#[non_exhaustive]
pub struct Error(Box<Parts>);

struct Parts {
    code: Code,
    message: String,
    help: Option<String>,
    /// The error that candle reported, if it is not one of ours.
    source: Option<candle_core::Error>,
}

/// Between the message and the help, in the printed form.
const HELP: &str = "\n  help: ";

impl Error {
    /// An error with a code and a message: lower case, no full stop, `expected X, found Y`.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self(Box::new(Parts {
            code,
            message: message.into(),
            help: None,
            source: None,
        }))
    }

    /// Adds what the user can do: something that can be typed.
    #[must_use]
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.0.help = Some(help.into());
        self
    }

    /// Puts what was being done before the message: `context: message`.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.0.message = format!("{context}: {}", self.0.message);
        self
    }

    /// The code.
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// The message, without help and code.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// What the user can do, if there is something to type.
    pub fn help(&self) -> Option<&str> {
        self.0.help.as_deref()
    }

    /// The same error again, for a second reader; what candle reported stays with the first.
    pub(crate) fn copy(&self) -> Self {
        let Parts {
            code,
            message,
            help,
            source: _,
        } = &*self.0;
        Self(Box::new(Parts {
            code: *code,
            message: message.clone(),
            help: help.clone(),
            source: None,
        }))
    }

    /// The form in which an error travels to other processes.
    pub(crate) fn to_json(&self) -> Value {
        json!({ "code": self.code().id, "message": self.message(), "help": self.help() })
    }

    /// Reads [`to_json`](Self::to_json) back; `None` for anything else.
    pub(crate) fn from_json(json: &Value) -> Option<Self> {
        let word = |name: &str| json[name].as_str();
        let error = Self::new(*codes::find(word("code")?)?, word("message")?);
        Some(match word("help") {
            Some(help) => error.with_help(help),
            None => error,
        })
    }

    /// Reads the printed form back: the code at the end, the help before it.
    fn from_text(text: &str) -> Option<Self> {
        let (body, code) = text.trim_end().strip_suffix(']')?.rsplit_once(" [")?;
        let code = *codes::find(code)?;
        let (message, help) = match body.rsplit_once(HELP) {
            Some((message, help)) => (message, Some(help.to_owned())),
            None => (body, None),
        };
        Some(Self(Box::new(Parts {
            code,
            message: message.to_owned(),
            help,
            source: None,
        })))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        if let Some(help) = &self.0.help {
            write!(f, "{HELP}{help}")?;
        }
        write!(f, " [{}]", self.0.code.id)
    }
}

/// As [`Display`](fmt::Display), for a `main` that returns the error; then where candle failed, under `RUST_BACKTRACE=1`.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)?;
        match self.0.source.as_ref().and_then(backtrace) {
            Some(backtrace) => write!(f, "\n{backtrace}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|error| error as _)
    }
}

/// Carried whole inside [`candle_core::Error::Io`], the variant whose content can be taken out again.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match *error.0 {
            // Candle's own error goes back as it was, unless something was said about it.
            Parts {
                source: Some(source),
                ref message,
                ..
            } if *message == plain(&source) => source,
            parts => Self::Io(std::io::Error::other(Error(Box::new(parts)))),
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        unwrap(error).unwrap_or_else(|error| {
            let message = plain(&error);
            Self(Box::new(Parts {
                code: codes::CANDLE,
                message,
                help: None,
                source: Some(error),
            }))
        })
    }
}

impl From<SettingsError> for Error {
    fn from(error: SettingsError) -> Self {
        Self(Box::new(Parts {
            code: error.code,
            message: error.message,
            help: error.help,
            source: None,
        }))
    }
}

/// Takes one of our errors out of candle's wrappers, with the wrappers' context; gives candle's own errors back.
fn unwrap(error: candle_core::Error) -> Result<Error, candle_core::Error> {
    use candle_core::Error as Candle;
    match error {
        Candle::Io(io) => match io.downcast::<Error>() {
            Ok(error) => Ok(error),
            Err(io) => Err(Candle::Io(io)),
        },
        Candle::Context { inner, context } => match unwrap(*inner) {
            Ok(error) => Ok(error.context(context)),
            Err(inner) => Err(Candle::Context {
                inner: Box::new(inner),
                context,
            }),
        },
        Candle::WithPath { inner, path } => match unwrap(*inner) {
            Ok(error) => Ok(error.context(path.display())),
            Err(inner) => Err(Candle::WithPath {
                inner: Box::new(inner),
                path,
            }),
        },
        Candle::WithBacktrace { inner, backtrace } => match unwrap(*inner) {
            Ok(error) => Ok(error),
            Err(inner) => Err(Candle::WithBacktrace {
                inner: Box::new(inner),
                backtrace,
            }),
        },
        Candle::WrappedContext { wrapped, context } => match wrapped.downcast::<Candle>() {
            Ok(inner) => match unwrap(*inner) {
                Ok(error) => Ok(error.context(context)),
                Err(inner) => Err(Candle::WrappedContext {
                    wrapped: Box::new(inner),
                    context,
                }),
            },
            Err(wrapped) => match wrapped.downcast::<Error>() {
                Ok(error) => Ok(error.context(context)),
                Err(wrapped) => Err(Candle::WrappedContext { wrapped, context }),
            },
        },
        Candle::Wrapped(shown) => {
            Error::from_text(&shown.to_string()).ok_or(Candle::Wrapped(shown))
        }
        Candle::Msg(text) => Error::from_text(&text).ok_or(Candle::Msg(text)),
        other => Err(other),
    }
}

/// The text of a candle error, context first and without its backtrace.
fn plain(error: &candle_core::Error) -> String {
    use candle_core::Error as Candle;
    match error {
        Candle::WithBacktrace { inner, .. } => plain(inner),
        Candle::Context { inner, context } => format!("{context}: {}", plain(inner)),
        Candle::WithPath { inner, path } => format!("{}: {}", path.display(), plain(inner)),
        Candle::WrappedContext { wrapped, context } => match wrapped.downcast_ref::<Candle>() {
            Some(inner) => format!("{context}: {}", plain(inner)),
            None => format!("{context}: {wrapped}"),
        },
        other => other.to_string(),
    }
}

/// The innermost backtrace that candle captured: where the error began.
fn backtrace(error: &candle_core::Error) -> Option<&std::backtrace::Backtrace> {
    use candle_core::Error as Candle;
    match error {
        Candle::WithBacktrace {
            inner,
            backtrace: outer,
        } => backtrace(inner).or(Some(outer)),
        Candle::Context { inner, .. } | Candle::WithPath { inner, .. } => backtrace(inner),
        Candle::WrappedContext { wrapped, .. } => {
            wrapped.downcast_ref::<Candle>().and_then(backtrace)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
