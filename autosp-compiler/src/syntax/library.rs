//! Functions of libraries that are followed through a definition of our own.

/// Helpers that crates keep copies of, which are compared with their definition when the program runs.
pub(crate) const SHARED: &str = "candle_transformers::utils";

/// The absolute path of a function of `ops/library.rs`.
pub(crate) fn path(name: &str) -> String {
    let home = if name == "flash_attn" {
        "candle_nn::attention"
    } else {
        SHARED
    };
    format!("{home}::{name}")
}

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
        assert_eq!(items.len(), 4);
        assert!(items.iter().all(|item| matches!(item, syn::Item::Fn(_))));
    }
}
