//! What the operating system says, in this project's style.

/// The reason of an input or output error: lower case, without the operating system's number.
pub fn io_reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error")
        .next()
        .unwrap_or_default()
        .to_lowercase()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_missing_file_is_said_in_words() {
        let error = std::fs::read("there/is/no/such/file").expect_err("nothing there");
        assert_eq!(super::io_reason(&error), "no such file or directory");
    }
}
