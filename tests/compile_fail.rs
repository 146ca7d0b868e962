//! What the attribute says to models that it cannot take: one file each in `compile_fail/`, with the message beside it.

#[test]
fn refusals_at_compile_time() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
