//! Functions that call each other stay on the stack that rustc gives to an attribute, 8 MB, as deep as they may nest; what nests deeper
//! has an error code.

use std::fmt::Write as _;

/// On a thread with the stack that rustc's own threads have.
fn as_in_rustc(run: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(8 << 20);
    let thread = thread.spawn(run).expect("a thread");
    thread.join().expect("no panic");
}

fn function(body: &str) -> String {
    format!(
        "use candle_core::{{Result, Tensor}}; pub fn f(x: &Tensor, a: bool) -> Result<Tensor> {{ {body} }}"
    )
}

/// What nests, `n` deep.
const NESTS: [fn(usize) -> String; 2] = [
    |n| format!("let y = {}x{}; Ok(y.clone())", "(".repeat(n), ")".repeat(n)),
    |n| {
        format!(
            "let y = {}x{}; Ok(y.clone())",
            "match a { _ => ".repeat(n),
            " }".repeat(n)
        )
    },
];

#[test]
fn what_nests_too_deeply_has_a_code() {
    let source = function(&NESTS[0](2_000));
    let error = autosp_compiler::analyse(&source).expect_err("too deep");
    assert_eq!(error.code.id, "AS0107");
    assert!(error.to_string().ends_with("[AS0107]"), "{error}");
    assert!(autosp_compiler::expand(&source).is_err());
}

#[test]
fn functions_that_call_each_other_nest_no_deeper() {
    // Each body as deep as it may be, each calling the next from its innermost place.
    for nest in [0, 1] {
        as_in_rustc(move || {
            let body = |k: usize, n: usize| {
                let inner = format!("f{}(x, a)?", k + 1);
                NESTS[nest](n).replacen('x', &inner, 1)
            };
            let source = |n: usize| {
                let mut all = String::from("use candle_core::{Result, Tensor};");
                for k in 0..34 {
                    let head = "(x: &Tensor, a: bool) -> Result<Tensor>";
                    let _ = write!(all, " pub fn f{k}{head} {{ {} }}", body(k, n));
                }
                all + " pub fn f34(x: &Tensor, a: bool) -> Result<Tensor> { x.t() }"
            };
            assert!(autosp_compiler::analyse(&source(12)).is_ok());
            let _ = autosp_compiler::analyse(&source(200));
        });
    }
}
