//! What is let through stays on the stack that rustc gives to an attribute, 8 MB, as deep as it may nest; what nests deeper has an error
//! code.

mod common;

use std::fmt::Write as _;

use common::as_in_rustc;

fn function(body: &str) -> String {
    format!(
        "use candle_core::{{Result, Tensor}}; pub fn f(x: &Tensor, a: bool) -> Result<Tensor> {{ {body} }}"
    )
}

/// What nests, `n` deep.
const NESTS: [fn(usize) -> String; 12] = [
    |n| format!("let y = {}x{}; Ok(y.clone())", "(".repeat(n), ")".repeat(n)),
    |n| {
        format!(
            "let y = {}x{}; Ok(y.clone())",
            "{ ".repeat(n),
            " }".repeat(n)
        )
    },
    |n| {
        format!(
            "let y = {}x{}; Ok(y.clone())",
            "&[".repeat(n),
            "]".repeat(n)
        )
    },
    |n| format!("let y = x{}; Ok(y)", ".t()?".repeat(n)),
    |n| format!("let y = x{}; y", " + x".repeat(n)),
    |n| format!("let y = {}a; Ok(x.clone())", "!".repeat(n)),
    |n| {
        format!(
            "let y = {}{{ x }}; Ok(y.clone())",
            "if a { x } else ".repeat(n)
        )
    },
    |n| format!("let y = {}x; Ok(x.clone())", "|a| ".repeat(n)),
    |n| {
        format!(
            "let y = {}x{}; Ok(y.clone())",
            "match a { _ => ".repeat(n),
            " }".repeat(n)
        )
    },
    |n| {
        format!(
            "{}{} Ok(x.clone())",
            "for _ in 0..2 { ".repeat(n),
            "}".repeat(n)
        )
    },
    |n| {
        format!(
            "let y = {}x{}; y",
            "Tensor::cat(&[&".repeat(n),
            "], 0)?".repeat(n)
        )
    },
    |n| {
        format!(
            "let {}y{} = a; Ok(x.clone())",
            "Some(".repeat(n),
            ")".repeat(n)
        )
    },
];

#[test]
fn what_is_let_through_fits_on_the_stack_and_the_rest_has_a_code() {
    as_in_rustc(|| {
        for nest in NESTS {
            assert!(autosp_compiler::analyse(&function(&nest(12))).is_ok());
            for n in [25, 100, 300] {
                let source = function(&nest(n));
                if autosp_compiler::analyse(&source).is_ok() {
                    assert!(autosp_compiler::expand(&source).is_ok());
                }
            }
            let error = autosp_compiler::analyse(&function(&nest(2_000))).expect_err("too deep");
            assert_eq!(error.code.id, "AS0107");
            assert!(error.to_string().ends_with("[AS0107]"), "{error}");
        }
    });
}

#[test]
fn functions_that_call_each_other_nest_no_deeper() {
    // Each body as deep as it may be, each calling the next from its innermost place.
    for nest in [0, 8] {
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
