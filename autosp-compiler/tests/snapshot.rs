//! What is emitted for the example Llama, as a person reads it.

mod common;

use common::llama;

/// The expansion as text.
fn expanded() -> String {
    let source = format!("#[autosp::sequence_parallel]\nmod llama {{ {} }}", llama());
    let file = autosp_compiler::expand(&source)
        .expect("valid Rust")
        .expect("no refusal");
    prettyplease::unparse(&file)
}

/// The part of the text from the first line that contains `from` up to the line before one that contains `to`.
fn part(text: &str, from: &str, to: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let start = lines
        .iter()
        .position(|l| l.contains(from))
        .expect("the beginning");
    let end = lines[start + 1..]
        .iter()
        .position(|l| l.contains(to))
        .map_or(lines.len(), |e| start + 1 + e);
    lines[start..end].join("\n")
}

#[test]
fn the_attention_block() {
    let text = expanded();
    let twins = text
        .split("impl Attention {")
        .nth(2)
        .expect("the twins of the attention");
    let twins = twins.split("#[derive").next().expect("the end of the impl");
    insta::assert_snapshot!("attention", twins);
}

#[test]
fn the_masks() {
    let text = expanded();
    let twins = text
        .split("impl Cache {")
        .nth(2)
        .expect("the twins of the cache");
    insta::assert_snapshot!("masks", part(twins, "pub(crate) fn mask__sp", "#[derive"));
}

#[test]
fn the_root() {
    let text = expanded();
    let original = text.split("pub fn forward(").last().expect("the root");
    insta::assert_snapshot!(
        "root",
        part(
            &format!("pub fn forward({original}"),
            "pub fn forward(",
            "pub(crate) mod autosp_sites"
        )
    );
}

#[test]
fn the_schedule() {
    insta::assert_snapshot!(
        "schedule",
        part(&expanded(), "pub(crate) mod autosp_sites", "NEVER")
    );
}

#[test]
fn the_originals_stay_as_they_are() {
    let text = expanded();
    let before = prettyplease::unparse(&syn::parse_file(&llama()).expect("valid Rust"));
    // Every function of the model is there, to the letter, except for the line that a root gets.
    for function in before
        .split("\n    fn ")
        .skip(1)
        .map(|f| f.split("\n    }\n").next().expect("an end"))
    {
        assert!(text.contains(function), "missing:\n{function}");
    }
}

#[test]
fn emission_is_deterministic() {
    assert_eq!(expanded(), expanded());
}

#[test]
fn a_module_with_its_own_rt_keeps_it() {
    let source = format!("mod rt {{}}\n{}", llama());
    let file = autosp_compiler::expand(&source)
        .expect("valid Rust")
        .expect("no refusal");
    let text = prettyplease::unparse(&file);
    assert!(
        text.contains("use ::autosp::rt as autosp_rt;")
            && text.contains("autosp_rt::softmax(&scores)")
    );
}
