//! What a user says of functions and fields, and items that are annotated alone.

use autosp_compiler::{Analysis, sequence_parallel};

const MODEL: &str = "
    #[sequence_parallel(ARGS)]
    mod model {
        use candle_core::{Module, Result, Tensor};
        use candle_nn::Linear;
        use elsewhere::{Mixer, table};

        pub struct Attention { qkv: Linear, FIELD mixer: Mixer, heads: usize }

        impl Attention {
            FUNCTION
            fn positions(&self, x: &Tensor) -> Result<Tensor> { table(x) }

            pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
                let (b, s, h) = x.dims3()?;
                let x = x.broadcast_add(&self.positions(x)?)?;
                let qkv = self.qkv.forward(&x)?.reshape((b, s, 3 * self.heads, h / self.heads))?.transpose(1, 2)?;
                let part = |i: usize| qkv.narrow(1, i * self.heads, self.heads)?.contiguous();
                let (q, k, v) = (part(0)?, part(1)?, part(2)?);
                let weights = candle_nn::ops::softmax_last_dim(&q.matmul(&k.t()?)?)?;
                let y = weights.matmul(&v)?.transpose(1, 2)?.reshape((b, s, h))?;
                self.mixer.forward(&y)
            }
        }
    }";

fn analysed(args: &str, field: &str, function: &str) -> Analysis {
    let source = MODEL
        .replace("(ARGS)", args)
        .replace("FIELD", field)
        .replace("FUNCTION", function);
    autosp_compiler::analyse(&source).expect("valid Rust")
}

fn codes(analysis: &Analysis) -> Vec<&'static str> {
    analysis.refusals.iter().map(|r| r.code.id).collect()
}

#[test]
fn what_is_not_seen_is_refused_until_something_is_said_of_it() {
    assert_eq!(codes(&analysed("", "", "")), ["AS0202"]);
    assert_eq!(codes(&analysed("", "#[tokenwise]", "")), ["AS0202"]);
    for (args, field, function) in [
        ("", "#[tokenwise]", "#[replicated]"),
        ("", "#[autosp::tokenwise]", "#[tokenwise]"),
        (
            "(tokenwise(Attention::mixer), replicated(Attention::positions))",
            "",
            "",
        ),
        (
            "(tokenwise(Attention::mixer, model::Attention::positions))",
            "",
            "",
        ),
    ] {
        let analysis = analysed(args, field, function);
        assert!(
            analysis.refusals.is_empty(),
            "{args}: {}",
            analysis.refusals[0].text(None)
        );
        assert_eq!(analysis.plan.sites.len(), 1);
    }
}

#[test]
fn what_is_said_is_not_in_the_code_that_is_emitted() {
    let source = MODEL
        .replace("(ARGS)", "")
        .replace("FIELD", "#[tokenwise]")
        .replace("FUNCTION", "#[replicated]");
    let file = autosp_compiler::expand(&source)
        .expect("valid Rust")
        .expect("accepted");
    let text = prettyplease::unparse(&file);
    assert!(
        !text.contains("tokenwise") && !text.contains("#[replicated]"),
        "{text}"
    );
    assert!(text.contains("self.mixer.forward(&y)"), "{text}");
}

#[test]
fn what_is_said_of_nothing_wrongly_twice_or_in_vain_is_reported() {
    for (args, what) in [
        (
            "(tokenwise(Attention::mixed))",
            "neither a function nor a field",
        ),
        ("(tokenwise(Attention::heads))", "is a number"),
        ("(sharded(Attention::mixer))", "is a field"),
        (
            "(tokenwise(Attention::mixer), replicated(Attention::mixer))",
            "is said to be tokenwise and replicated",
        ),
        (
            "(tokenwise(Attention::mixer), replicated(Attention::positions), sharded(Attention::forward))",
            "nothing",
        ),
    ] {
        let analysis = analysed(args, "", "");
        let first = analysis.refusals.first();
        if what == "nothing" {
            assert!(first.is_none());
            continue;
        }
        let first = first.unwrap_or_else(|| panic!("{args} is accepted"));
        assert_eq!(first.code.id, "AS0106", "{}", first.text(None));
        assert!(
            first.message.contains(what) && first.help.is_some(),
            "{}",
            first.text(None)
        );
    }
    let unused = analysed(
        "(tokenwise(Attention::mixer), replicated(Attention::positions, Attention::qkv))",
        "",
        "",
    );
    assert!(unused.refusals.is_empty() || codes(&unused) == ["AS0106"]);
}

/// The text of the errors in what the attribute gives back.
fn annotated(args: &str, item: &str) -> String {
    let tokens = |text: &str| text.parse::<proc_macro2::TokenStream>().expect("tokens");
    sequence_parallel(tokens(args), &tokens(item), None).to_string()
}

const FUNCTION: &str = "
    pub fn attend(x: &Tensor, qkv: &candle_nn::Linear, heads: usize) -> candle_core::Result<Tensor> {
        let (b, s, h) = x.dims3()?;
        let qkv = qkv.forward(x)?.reshape((b, s, 3 * heads, h / heads))?.transpose(1, 2)?;
        let (q, k, v) = (qkv.narrow(1, 0, heads)?, qkv.narrow(1, heads, heads)?, qkv.narrow(1, 2 * heads, heads)?);
        let weights = candle_nn::ops::softmax_last_dim(&q.matmul(&k.t()?)?)?;
        weights.matmul(&v)?.transpose(1, 2)?.reshape((b, s, h))
    }";

#[test]
fn a_function_that_holds_everything_is_accepted() {
    let text = annotated("", FUNCTION);
    assert!(!text.contains("compile_error"), "{text}");
    assert!(
        text.contains("attend__sp") && text.contains("mod autosp_sites_attend"),
        "{text}"
    );
    assert!(!text.contains("autosp_sites ::"), "{text}");
}

#[test]
fn an_impl_whose_functions_need_no_field_is_accepted_and_another_is_refused() {
    let held = format!("impl Attention {{ {FUNCTION} }}");
    let text = annotated("", &held);
    assert!(!text.contains("compile_error"), "{text}");
    assert!(text.contains("mod autosp_sites_attention"), "{text}");
    let field = held
        .replace("x: &Tensor, qkv: &candle_nn::Linear,", "&self, x: &Tensor,")
        .replace("qkv.forward(x)", "self.qkv.forward(x)");
    let text = annotated("", &field);
    assert!(
        text.contains("AS0103") && text.contains("declared outside"),
        "{text}"
    );
    assert!(annotated("", "struct Alone;").contains("AS0103"));
    assert!(annotated("", "mod absent;").contains("AS0102"));
}
