//! Functions of libraries that are followed through a definition of our own.

/// Where the functions of `ops/library.rs` live.
pub(crate) const HOME: &str = "candle_transformers::utils";

/// The module that holds their twins in the emitted code.
pub(crate) const MODULE: &str = "autosp_library";

/// The definitions. Parsed anew each time, since the tokens of one expansion may not outlive it.
pub(crate) fn items() -> Vec<syn::Item> {
    syn::parse_file(include_str!("../../ops/library.rs"))
        .map_or_else(|_| Vec::new(), |file| file.items)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_definitions_are_functions() {
        let items = super::items();
        assert_eq!(items.len(), 3);
        assert!(items.iter().all(|item| matches!(item, syn::Item::Fn(_))));
    }
}
