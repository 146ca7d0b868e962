//! Every error code of the project: what it means and what to do, in one table.
//!
//! `AS01xx` attribute and syntax, `AS02xx` analysis, `AS03xx` mesh, scope and sites at run time, `AS04xx` collectives and
//! faults, `AS05xx` training, data and files, `AS06xx` command line. A code is never reused.

/// One error code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code {
    /// The code as it is printed, such as `AS0203`.
    pub id: &'static str,
    /// One line: what is wrong.
    pub title: &'static str,
    /// Why it is refused and what to do, as `cargo autosp explain` prints it.
    pub explanation: &'static str,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $title:literal, $explanation:literal;)*) => {
        $(
            #[doc = concat!("`", $id, "`: ", $title, ".")]
            $(#[$doc])*
            pub const $name: Code = Code { id: $id, title: $title, explanation: $explanation };
        )*
        /// All codes, in order.
        pub const ALL: &[Code] = &[$($name),*];
    };
}

codes! {
    UNKNOWN_ARGUMENT = "AS0101", "unknown attribute argument",
        "The attribute takes the arguments listed in the message. Anything else is refused, since a misspelt setting would otherwise be ignored.";

    UNREADABLE_FILE = "AS0601", "a file named on the command line cannot be read",
        "The path does not exist, is a folder, is not UTF-8 text, or may not be read. The message says which. `plan` and `expand` take one Rust source file.";
    UNPARSABLE_FILE = "AS0602", "a file named on the command line is not Rust",
        "The file could not be parsed as Rust source, at the line and column that the message names. `rustc` or `cargo check` says more about it.";
    UNKNOWN_CODE = "AS0603", "unknown error code",
        "`explain` takes a code as messages print it in square brackets, such as AS0101, in any case. Without an argument it lists all codes.";
}

/// Looks a code up by its printed form, in any case.
pub fn find(id: &str) -> Option<&'static Code> {
    ALL.iter().find(|code| code.id.eq_ignore_ascii_case(id))
}
