//! Losses over all tokens: what is emitted for models that keep one token and for models that give all logits, and when logits are whole.

mod common;

use autosp_plan::plan::{Action, Kind, Plan};
use common::{edit, llama};

fn annotated(source: &str) -> String {
    format!("#[autosp::sequence_parallel(loss)]\nmod model {{ {source} }}")
}

fn expanded(source: &str) -> String {
    let file = autosp_compiler::expand(&annotated(source))
        .expect("valid Rust")
        .unwrap_or_else(|refusals| panic!("{}", refusals[0].text(None)));
    prettyplease::unparse(&file)
}

fn plan(source: &str) -> Plan {
    let analysis = autosp_compiler::analyse(&annotated(source)).expect("valid Rust");
    assert!(
        analysis.refusals.is_empty(),
        "{}",
        analysis.refusals[0].text(None)
    );
    analysis.plan
}

/// The body of the twin that the loss runs, and the loss.
fn emitted(source: &str) -> String {
    let text = expanded(source);
    let from = |needle: &str| text.find(needle).map(|at| &text[at..]);
    let twin = from("fn forward__sp2(").expect("a second twin of the root");
    let twin = &twin[..twin.find("\n    }").expect("its end") + 6];
    let loss = from("/// The mean cross-entropy").expect("a loss");
    let loss = &loss[..loss.find("\n    }").expect("its end") + 6];
    format!("{twin}\n\n    {loss}")
}

/// What stands in the place of the product with the vocabulary; `None` if the loss makes all logits, or there is none.
fn head(source: &str) -> Option<String> {
    let plan = plan(source);
    let twin = &plan.twins[plan.roots[0].loss?];
    let head = twin.edits.iter().find_map(|e| match &e.action {
        Action::Replace(name) if name.starts_with("head::") => Some(name.clone()),
        _ => None,
    });
    assert_eq!(head.is_some(), twin.result == Kind::Logits);
    head
}

const END: &str = "self.lm_head.forward(&x)?.to_dtype(DType::F32)";

#[test]
fn a_llama_that_may_keep_one_token() {
    insta::assert_snapshot!("loss_llama", emitted(&llama()));
}

#[test]
fn a_gpt_2_with_a_tied_embedding() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/models/gpt2.rs");
    let source = std::fs::read_to_string(path).expect("the example model");
    insta::assert_snapshot!("loss_gpt2", emitted(&source));
}

#[test]
fn a_soft_cap_by_a_setting_and_a_scale_in_a_helper() {
    let all = edit(&llama(), "x.i((.., seq_len - 1, ..))?.contiguous()?", "x");
    let capped = edit(
        &all,
        END,
        "let logits = self.lm_head.forward(&x)?;
         let logits = match self.cap { None => logits, Some(cap) => ((logits / cap)?.tanh()? * cap)? };
         self.scaled(logits)",
    );
    let capped = edit(
        &capped,
        "last_token_only: bool,\n}\n\nimpl Llama {",
        "last_token_only: bool, cap: Option<f64>,\n}\n\nimpl Llama { fn scaled(&self, logits: Tensor) -> Result<Tensor> { (&logits * 0.5)?.to_dtype(DType::F32) }",
    );
    let text = emitted(&capped);
    assert!(text.contains("self.scaled__sp(logits)"), "{text}");
    insta::assert_snapshot!("loss_capped", text);
}

#[test]
fn logits_pass_through_what_works_on_each_alone() {
    assert_eq!(head(&llama()).as_deref(), Some("head::linear"));
    for end in [
        "x.apply(&self.lm_head)?.contiguous()",
        "self.lm_head.forward(&x)?.affine(2.0, 0.1)",
        "(self.lm_head.forward(&x)? / 3.0)? - 1.0",
        "if self.last_token_only { self.lm_head.forward(&x) } else { x.apply(&self.lm_head)?.tanh() }",
        "let logits: Tensor = self.lm_head.forward(&x)?; Ok(logits)",
    ] {
        assert_eq!(
            head(&edit(&llama(), END, end)).as_deref(),
            Some("head::linear"),
            "{end}"
        );
    }
    // Of all tokens, so that the product has the form of a matrix product.
    let all = edit(&llama(), "x.i((.., seq_len - 1, ..))?.contiguous()?", "x");
    let tied = edit(
        &all,
        END,
        "x.broadcast_matmul(&self.embed_tokens.embeddings().t()?)",
    );
    assert_eq!(head(&tied).as_deref(), Some("head::matmul"));
}

/// The numbers stay those of the model's own code, whatever it does to its logits.
#[test]
fn other_ends_are_not_taken_for_heads() {
    let all = edit(&llama(), "x.i((.., seq_len - 1, ..))?.contiguous()?", "x");
    for (end, why) in [
        (
            "self.lm_head.forward(&x)?.sqr()",
            "`self.lm_head.forward(&x)?.sqr()` stands behind",
        ),
        ("1.0 - self.lm_head.forward(&x)?", "stands behind"),
        (
            "let y = self.lm_head.forward(&x)?; y.broadcast_mul(&self.lm_head.forward(&x)?)",
            "stands behind",
        ),
        ("Tensor::tanh(&self.lm_head.forward(&x)?)", "stands behind"),
        (
            "let y = self.lm_head.forward(&x)?; let (_b, _s, _v) = y.dims3()?; Ok(y)",
            "the sizes of",
        ),
        ("self.norm.forward(&x)", "stands behind"),
    ] {
        let source = edit(&all, END, end);
        assert_eq!(head(&source), None, "{end}");
        let plan = plan(&source);
        assert!(plan.roots[0].loss.is_none(), "{end}");
        assert!(
            plan.notes.iter().any(|n| n.contains(why)),
            "{end}: {:?}",
            plan.notes
        );
    }
}

/// A model that keeps one token has its loss all the same; its logits are whole.
#[test]
fn a_kept_token_has_a_loss_whatever_follows() {
    let last = edit(
        &llama(),
        "if self.last_token_only {\n            x.i((.., seq_len - 1, ..))?.contiguous()?\n        } else {\n            x\n        }",
        "x.i((.., seq_len - 1, ..))?",
    );
    assert_eq!(head(&last).as_deref(), Some("head::linear"));
    // The token may be taken of the logits.
    let late = edit(&last, "let x = x.i((.., seq_len - 1, ..))?;", "");
    let late = edit(
        &late,
        END,
        "self.lm_head.forward(&x)?.i((.., seq_len - 1, ..))?.to_dtype(DType::F32)",
    );
    assert_eq!(head(&late).as_deref(), Some("head::linear"));
    assert!(emitted(&late).contains("rt::fold(&rt::head::linear(&self.lm_head, &x)?, 1, false)?"));
    let squared = edit(&last, END, "self.lm_head.forward(&x)?.sqr()");
    let plan = plan(&squared);
    let twin = &plan.twins[plan.roots[0].loss.expect("a loss")];
    assert_eq!(twin.result, Kind::Data);
    assert!(
        plan.notes.iter().any(|n| n.contains("makes all logits")),
        "{:?}",
        plan.notes
    );
}

#[test]
fn a_function_of_that_name_stays_the_only_one() {
    let own = edit(
        &llama(),
        "    /// Logits in f32:",
        "    pub fn forward_loss(&self) -> usize { 1 }\n\n    /// Logits in f32:",
    );
    let plan = plan(&own);
    assert!(plan.roots[0].loss.is_none());
    assert!(
        plan.notes
            .iter()
            .any(|n| n.contains("a function of that name")),
        "{:?}",
        plan.notes
    );
}

#[test]
fn without_the_argument_there_is_no_loss() {
    let analysis = autosp_compiler::analyse(&llama()).expect("valid Rust");
    assert!(analysis.plan.roots.iter().all(|r| r.loss.is_none()));
}
