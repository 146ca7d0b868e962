//! The encoder and edits of it: masks that a caller gives, sums over tokens, and what cannot be followed of them.

mod common;

use autosp_compiler::Refusal;
use autosp_plan::plan::Plan;
use common::edit;

fn encoder() -> String {
    std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../examples/models/encoder.rs"
    ))
    .expect("the example model")
}

fn analysed(source: &str) -> Result<Plan, Vec<Refusal>> {
    let analysis = autosp_compiler::analyse(source).expect("valid Rust");
    if analysis.refusals.is_empty() {
        Ok(analysis.plan)
    } else {
        Err(analysis.refusals)
    }
}

fn plan(source: &str) -> Plan {
    analysed(source).unwrap_or_else(|r| panic!("{}", r[0].text(None)))
}

fn expanded(source: &str) -> String {
    let file = autosp_compiler::expand(source).expect("valid Rust");
    let file = file.unwrap_or_else(|r| panic!("{}", r[0].text(None)));
    prettyplease::unparse(&file)
}

#[test]
fn the_encoder_is_taken_as_it_is_written() {
    let plan = plan(&encoder());
    assert_eq!(plan.sites.len(), 1);
    assert_eq!(
        plan.sites[0].mask,
        "keys by `(1.0 - mask)? * f64::from(f32::MIN)`"
    );
    assert!(plan.blocks[0].scope.is_some(), "{:?}", plan.blocks);
    let root = &plan.roots[0];
    assert_eq!(root.inputs, [("tokens".into(), 1), ("mask".into(), 1)]);
    assert_eq!(root.beside.len(), 1);
    let text = expanded(&encoder());
    for part in [
        "scores.broadcast_add(&rt::mask(&bias)?)",
        "rt::sequence::sum(&weights, 1)",
        "rt::sequence::sum(&x.broadcast_mul(&weights)?, 1)",
        "rt::pick(&x, 1, 0)",
        "rt::enter_beside(\"Classifier::forward\", \"types\", types, 1, 2)?",
    ] {
        assert!(text.contains(part), "`{part}` in\n{text}");
    }
}

/// The edit is refused with the code; the message is given back.
fn refused(from: &str, to: &str, code: &str) -> String {
    let source = edit(&encoder(), from, to);
    let refusals = analysed(&source).expect_err("accepted");
    let texts: Vec<String> = refusals.iter().map(|r| r.text(None)).collect();
    assert!(
        refusals
            .iter()
            .any(|r| r.code.id == code && r.help.is_some()),
        "{texts:?}"
    );
    texts.join("\n")
}

/// The edit is accepted; the expansion holds the text.
fn accepted(from: &str, to: &str, holds: &str) {
    let text = expanded(&edit(&encoder(), from, to));
    assert!(text.contains(holds), "`{holds}` in\n{text}");
}

const BIAS: &str = "let mask = mask.unsqueeze(1)?.unsqueeze(2)?.to_dtype(dtype)?;";
const POOL: &str = "None => masked_mean(&x, mask)?,";

#[test]
fn a_mask_over_queries_or_pairs_is_refused() {
    refused(
        BIAS,
        "let mask = mask.unsqueeze(1)?.unsqueeze(3)?.to_dtype(dtype)?;",
        "AS0208",
    );
    refused(
        BIAS,
        "let mask = mask.unsqueeze(1)?.unsqueeze(2)?.broadcast_mul(&mask.unsqueeze(1)?.unsqueeze(3)?)?.to_dtype(dtype)?;",
        "AS0203",
    );
    // [b, s] added to [b, h, s, s] would be rows of queries times keys of another row.
    refused(
        "scores.broadcast_add(bias)?",
        "scores.broadcast_add(&bias.squeeze(1)?.squeeze(1)?.unsqueeze(2)?)?",
        "AS0207",
    );
}

#[test]
fn a_mask_that_scores_are_multiplied_with_or_that_is_learned_is_refused() {
    refused(
        "scores.broadcast_add(bias)?",
        "scores.broadcast_mul(bias)?",
        "AS0208",
    );
    refused(
        "let bias = key_bias(mask, x.dtype())?;",
        "let bias = x.narrow(2, 0, 1)?.unsqueeze(1)?.transpose(2, 3)?;",
        "AS0217",
    );
}

#[test]
fn reductions_over_tokens_that_have_no_form_over_ranks_are_refused() {
    refused(POOL, "None => x.max(1)?,", "AS0203");
    refused(POOL, "None => x.min_keepdim(1)?.squeeze(1)?,", "AS0203");
    refused(POOL, "None => x.cumsum(1)?.i((.., 0))?,", "AS0203");
    refused(
        POOL,
        "None => mask.unsqueeze(1)?.to_dtype(x.dtype())?.matmul(&x)?.squeeze(1)?,",
        "AS0203",
    );
    refused(
        POOL,
        "None => x.flatten_to(1)?.mean(0)?.unsqueeze(0)?,",
        "AS0203",
    );
    refused(POOL, "None => x.narrow(1, 0, 2)?.mean(1)?,", "AS0203");
    // All tokens of all rows: the rows are shared out.
    refused(
        POOL,
        "None => x.broadcast_mul(&x.mean_all()?)?.mean(1)?,",
        "AS0203",
    );
}

#[test]
fn rows_of_the_batch_are_not_mixed_either() {
    let classify = "self.classifier.forward(&pooled)";
    refused(
        classify,
        "self.classifier.forward(&pooled.broadcast_sub(&pooled.mean_keepdim(0)?)?)",
        "AS0203",
    );
    refused(classify, "pooled.matmul(&pooled.t()?)", "AS0203");
    refused(
        classify,
        "self.classifier.forward(&pooled.i(0)?.unsqueeze(0)?)",
        "AS0203",
    );
    refused(
        classify,
        "self.classifier.forward(&x.i(0)?.mean(0)?.unsqueeze(0)?)",
        "AS0203",
    );
    refused(
        classify,
        "candle_nn::ops::softmax(&self.classifier.forward(&pooled)?, 0)",
        "AS0203",
    );
}

#[test]
fn sums_and_means_are_taken_over_all_ranks() {
    accepted(POOL, "None => x.mean(1)?,", "rt::sequence::mean(&x, 1)?");
    accepted(
        POOL,
        "None => x.transpose(1, 2)?.mean(2)?,",
        "rt::sequence::mean(&x.transpose(1, 2)?, 2)?",
    );
    accepted(
        POOL,
        "None => x.narrow(1, 0, 1)?.squeeze(1)?,",
        "rt::pick_narrow(&x, 1, 0)?",
    );
}

#[test]
fn rows_are_not_paired_before_they_are_pooled() {
    refused(
        POOL,
        "None => x.unsqueeze(0)?.broadcast_sub(&x.unsqueeze(1)?)?.sum(0)?.mean(1)?,",
        "AS0203",
    );
    // The batch by its other name.
    refused(
        "self.classifier.forward(&pooled)",
        "pooled.matmul(&mask.to_dtype(pooled.dtype())?.sum_keepdim(1)?.broadcast_mul(&pooled)?.t()?)",
        "AS0203",
    );
}

#[test]
fn a_rule_and_a_mask_from_the_caller_are_added_one_after_the_other() {
    let rule = "let rule: Vec<f32> = (0..s).flat_map(|i| (0..s).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 })).collect();
        let rule = Tensor::from_vec(rule, (s, s), x.device())?;
        let scores = (q.matmul(";
    let source = edit(&encoder(), "let scores = (q.matmul(", rule);
    let source = edit(
        &source,
        "let q = self.split(",
        "let (_, s, _) = x.dims3()?;\n        let q = self.split(",
    );
    let both = edit(
        &source,
        "scores.broadcast_add(bias)?",
        "scores.broadcast_add(&rule)?.broadcast_add(bias)?",
    );
    assert_eq!(plan(&both).sites.len(), 1);
    let sum = edit(
        &source,
        "scores.broadcast_add(bias)?",
        "scores.broadcast_add(&rule.broadcast_add(bias)?)?",
    );
    assert_eq!(analysed(&sum).expect_err("accepted")[0].code.id, "AS0208");
}

/// A mask whose sizes nobody reads: as the caller has it, where that cannot matter.
#[test]
fn a_mask_of_unknown_rank_is_taken_for_scores_and_nothing_else() {
    let source = edit(&encoder(), "let (_b, _s) = mask.dims2()?;", "");
    let source = edit(&source, "key_bias(mask, x.dtype())?", "mask.clone()");
    let alone = edit(&source, POOL, "None => x.mean(1)?,");
    let plan = plan(&alone);
    assert_eq!(plan.roots[0].inputs, [("tokens".into(), 1)]);
    assert!(plan.roots[0].beside.iter().all(|b| b.name == "types"));
    for use_of in [
        "candle_nn::ops::softmax(mask, 1)?",
        "mask.narrow(1, 0, 1)?",
        "mask.flip(&[1])?",
        "mask.matmul(&x)?",
    ] {
        let pool = format!("None => x.mean(1)?.broadcast_mul(&{use_of})?,");
        let refusals = analysed(&edit(&source, POOL, &pool)).expect_err(use_of);
        assert!(refusals[0].help.is_some(), "{}", refusals[0].text(None));
    }
    // An index says how many dimensions there are at least; that there are no more is compared when the model is entered.
    let pool = "None => x.mean(1)?.broadcast_mul(&mask.i((.., 0))?.unsqueeze(1)?)?,";
    let root = analysed(&edit(&source, POOL, pool))
        .expect("accepted")
        .roots
        .remove(0);
    assert!(root.beside.iter().any(|b| b.name == "mask" && b.rank == 2));
}

/// A count that meets the tokens nowhere still counts the tokens of all ranks.
#[test]
fn an_input_that_meets_no_token_is_taken_to_be_their_shard() {
    let source = edit(&encoder(), "let (_b, _s) = mask.dims2()?;", "");
    let source = edit(
        &source,
        "let bias = key_bias(mask, x.dtype())?;",
        "let bias = key_bias(&tokens.ne(0u32)?, x.dtype())?;",
    );
    let source = edit(
        &source,
        POOL,
        "None => x.sum(1)?.broadcast_div(&mask.to_dtype(x.dtype())?.sum_keepdim(1)?)?,",
    );
    let root = plan(&source).roots.remove(0);
    assert!(
        root.beside
            .iter()
            .any(|b| (b.name.as_str(), b.dim, b.rank) == ("mask", 1, 2)),
        "{root:?}"
    );
    assert!(
        expanded(&source).contains("rt::sequence::sum_keepdim(&mask.to_dtype(x.dtype())?, 1)?")
    );
}

#[test]
fn dropout_of_tokens_is_drawn_by_row_and_token_and_of_weights_is_refused() {
    accepted(
        POOL,
        "None => candle_nn::ops::dropout(&x, 0.1)?.mean(1)?,",
        "rt::ops::dropout(&x, 0.1, [Some(0), Some(1)])?",
    );
    accepted(
        POOL,
        "None => candle_nn::ops::dropout(&x.mean(1)?, 0.1)?,",
        "rt::ops::dropout(&rt::sequence::mean(&x, 1)?, 0.1, [Some(0), None])?",
    );
    refused(
        POOL,
        "None => candle_nn::ops::dropout(&x.flatten_to(1)?, 0.1)?.reshape(x.shape())?.mean(1)?,",
        "AS0211",
    );
    refused(
        "weights.matmul(&v)?",
        "candle_nn::ops::dropout(&weights, 0.1)?.matmul(&v)?",
        "AS0211",
    );
}
