//! The body of the fuzzer in `fuzz/`, on random inputs for as long as a test may take.

mod common;

#[path = "../../fuzz/damage.rs"]
mod damage;

use common::as_in_rustc;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_models_come_back(model in 0u8..3, program in prop::collection::vec(any::<u8>(), 0..64)) {
        let mut input = vec![model];
        input.extend(program);
        as_in_rustc(move || damage::survive(&damage::source(&input)));
    }

    #[test]
    fn words_come_back(words in prop::collection::vec(prop::sample::select(damage::WORDS.to_vec()), 0..40)) {
        let body = words.join(" ");
        let source = damage::source(format!("fn f() {{ {body} }}").as_bytes());
        as_in_rustc(move || damage::survive(&source));
    }
}

#[test]
fn no_edits_leave_the_model() {
    for (which, model) in damage::MODELS.iter().enumerate() {
        let same = damage::source(&[u8::try_from(which).expect("few models")]);
        assert_eq!(same, *model);
    }
    // Other inputs are sources themselves.
    assert_eq!(damage::source(b"fn f() {}"), "fn f() {}");
}
