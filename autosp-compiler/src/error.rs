//! Refusals: what is wrong, where, why, and what to type instead.

use autosp_plan::codes::Code;
use proc_macro2::{Span, TokenStream};
use quote::quote_spanned;

/// One thing that the compiler cannot do, said to the user.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// The stable code.
    pub code: Code,
    /// Where.
    pub span: Span,
    /// What, in lower case and without a full stop.
    pub message: String,
    /// What the reader needs to know to believe it.
    pub notes: Vec<String>,
    /// What to type.
    pub help: Option<String>,
    /// The branch that it stands in, if that may be left untaken.
    pub(crate) branch: Option<crate::trace::branch::Branch>,
    /// Another branch of the same question can do without what is refused here.
    pub(crate) elsewhere: bool,
    /// It rules the whole module out, and is said before anything else.
    pub(crate) first: bool,
}

impl Refusal {
    pub(crate) fn new(code: Code, span: Span, message: impl Into<String>) -> Self {
        Self {
            code,
            span,
            message: message.into(),
            notes: Vec::new(),
            help: None,
            branch: None,
            elsewhere: false,
            first: false,
        }
    }

    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    pub(crate) fn in_branch(mut self, branch: Option<crate::trace::branch::Branch>) -> Self {
        self.branch = branch;
        self
    }

    /// 1-based line, 0 where the position is not known.
    pub fn line(&self) -> usize {
        self.span.start().line
    }

    /// 1-based column, 0 where the position is not known.
    pub fn column(&self) -> usize {
        let start = self.span.start();
        if start.line == 0 { 0 } else { start.column + 1 }
    }

    /// The whole text: message, notes, help, code. `place` stands before it where the span cannot show the position.
    pub fn text(&self, place: Option<&str>) -> String {
        let mut lines = vec![self.message.clone()];
        lines
            .extend(place.map(|file| format!("   = at: {file}:{}:{}", self.line(), self.column())));
        lines.extend(self.notes.iter().map(|n| format!("   = note: {n}")));
        lines.extend(self.help.iter().map(|h| format!("   = help: {h}")));
        format!("{} [{}]", lines.join("\n"), self.code.id)
    }

    /// `compile_error!` at the span.
    pub(crate) fn to_tokens(&self, place: Option<&str>) -> TokenStream {
        let text = self.text(place);
        quote_spanned!(self.span=> ::core::compile_error!(#text);)
    }
}
