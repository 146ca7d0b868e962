use candle_core::{Tensor, bail};
use proptest::prelude::*;

use super::*;

/// `candle_core::Error::context` is a trait method of results, and an inherent one of errors.
use candle_core::error::Context as _;

fn ours() -> Error {
    Error::new(codes::LOCAL_LENGTH, "expected length 4, found 5").with_help("sp.shard(&tokens)?")
}

/// What must survive.
fn parts(error: &Error) -> (&'static str, String, Option<String>) {
    (
        error.code().id,
        error.message().to_owned(),
        error.help().map(str::to_owned),
    )
}

fn candle(error: Error) -> candle_core::Error {
    error.into()
}

#[test]
fn code_message_and_help_survive_the_way_through_candle() {
    let back = Error::from(candle(ours()));
    assert_eq!(parts(&back), parts(&ours()));
    assert_eq!(candle(ours()).to_string(), ours().to_string());
}

#[test]
fn they_survive_every_wrapper_of_candle() {
    let result = || -> candle_core::Result<()> { Err(candle(ours())) };
    let expected = |context: &str| {
        let (code, message, help) = parts(&ours());
        (code, format!("{context}{message}"), help)
    };
    let cases: Vec<(&str, candle_core::Error, &str)> = vec![
        ("context", candle(ours()).context("layer 3"), "layer 3: "),
        (
            "trait context",
            result().context("layer 3").unwrap_err(),
            "layer 3: ",
        ),
        (
            "trait with_context",
            result().with_context(|| "layer 3").unwrap_err(),
            "layer 3: ",
        ),
        (
            "context twice",
            result().context("inner").context("outer").unwrap_err(),
            "outer: inner: ",
        ),
        (
            "context on ours",
            Err::<(), _>(ours()).context("layer 3").unwrap_err(),
            "layer 3: ",
        ),
        (
            "path",
            candle(ours()).with_path("a.safetensors"),
            "a.safetensors: ",
        ),
        ("bt", candle(ours()).bt(), ""),
        (
            "a captured backtrace",
            candle_core::Error::WithBacktrace {
                inner: Box::new(candle(ours())),
                backtrace: Box::new(std::backtrace::Backtrace::force_capture()),
            },
            "",
        ),
        ("wrap", candle_core::Error::wrap(ours()), ""),
        ("msg", candle_core::Error::msg(ours()), ""),
        ("debug", candle_core::Error::debug(ours()), ""),
        (
            "msg of candle's",
            candle_core::Error::msg(candle(ours())),
            "",
        ),
        (
            "all at once",
            candle(ours())
                .bt()
                .context("a")
                .with_path("b")
                .bt()
                .context("c"),
            "c: b: a: ",
        ),
    ];
    for (name, error, context) in cases {
        assert_eq!(parts(&Error::from(error)), expected(context), "{name}");
    }
}

#[test]
fn the_question_mark_converts_both_ways() {
    fn site() -> candle_core::Result<Tensor> {
        Err(ours())?
    }
    fn user() -> Result<Tensor> {
        Ok(site()?)
    }
    assert_eq!(parts(&user().unwrap_err()), parts(&ours()));
}

/// An error as candle makes it, with a backtrace whatever the environment says.
fn mismatch() -> candle_core::Error {
    candle_core::Error::WithBacktrace {
        inner: Box::new(candle_core::Error::CannotFindTensor {
            path: "wte".to_owned(),
        }),
        backtrace: Box::new(std::backtrace::Backtrace::force_capture()),
    }
}

#[test]
fn an_error_of_candle_keeps_its_variant_and_has_a_code() {
    let error = Error::from(mismatch());
    assert_eq!(error.to_string(), "cannot find tensor wte [AS0311]");
    assert!(std::error::Error::source(&error).is_some());
    assert!(
        format!("{error:?}").lines().count() > 3,
        "where it began is in the debug form"
    );

    let candle_core::Error::WithBacktrace { inner, .. } = candle(error) else {
        panic!("it goes back as it was")
    };
    assert!(matches!(
        *inner,
        candle_core::Error::CannotFindTensor { .. }
    ));

    let said = Error::from(candle(Error::from(mismatch()).context("block 2")));
    assert_eq!(
        (said.code(), said.message()),
        (codes::CANDLE, "block 2: cannot find tensor wte")
    );
    let around = Error::from(mismatch().context("block 2").with_path("w").bt());
    assert_eq!(
        (around.code(), around.message()),
        (codes::CANDLE, "w: block 2: cannot find tensor wte")
    );
}

#[test]
fn other_io_errors_and_messages_stay_candles() {
    let io = candle_core::Error::Io(std::io::Error::new(
        std::io::ErrorKind::NotFound,
        "no weights",
    ));
    let error = Error::from(io.with_path("w.safetensors"));
    assert_eq!(
        (error.code(), error.message()),
        (codes::CANDLE, "w.safetensors: no weights")
    );

    let bailed = || -> candle_core::Result<()> { bail!("rank [0] of a list [AS9999]") };
    assert_eq!(Error::from(bailed().unwrap_err()).code(), codes::CANDLE);
}

#[test]
fn debug_is_what_main_prints() {
    assert_eq!(
        format!("{:?}", ours()),
        "expected length 4, found 5\n  help: sp.shard(&tokens)? [AS0303]"
    );
}

proptest! {
    /// The printed form reads back, whatever the texts hold.
    #[test]
    fn the_printed_form_reads_back(message in "[^\n]{0,40}", help in proptest::option::of("[^\n]{0,40}"), code in 0..codes::ALL.len()) {
        let mut error = Error::new(codes::ALL[code], message);
        if let Some(help) = help {
            error = error.with_help(help);
        }
        let back = Error::from(candle_core::Error::wrap(error.copy()));
        prop_assert_eq!(parts(&back), parts(&error));
    }
}
