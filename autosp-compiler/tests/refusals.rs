//! Small edits that turn the example Llama into something that is refused: each with its code, its line and a way out.

mod common;

use autosp_compiler::Refusal;
use common::{edit, edit_n, llama};

fn refuse(source: &str) -> Vec<Refusal> {
    let analysis = autosp_compiler::analyse(source).expect("valid Rust");
    assert!(
        !analysis.refusals.is_empty(),
        "accepted with {} sites",
        analysis.plan.sites.len()
    );
    analysis.refusals
}

/// The edit is refused with the code, on the line that was edited, and with something to type.
fn refused(from: &str, to: &str, code: &str) -> Refusal {
    let source = edit(&llama(), from, to);
    let refusals = refuse(&source);
    let first = &refusals[0];
    assert_eq!(first.code.id, code, "{}", first.text(None));
    assert!(first.help.is_some(), "{}", first.text(None));
    let start = source[..source.find(to).expect("edited")].lines().count();
    let lines = start.max(1)..=start + to.lines().count() + 1;
    assert!(
        lines.contains(&first.line()),
        "line {} of {lines:?}: {}",
        first.line(),
        first.text(None)
    );
    first.clone()
}

#[test]
fn a_maximum_over_tokens() {
    let r = refused(
        "let x = self.norm.forward(&x)?;",
        "let x = x.broadcast_sub(&x.max_keepdim(1)?)?;",
        "AS0203",
    );
    assert!(
        r.message.contains("`x.max_keepdim(1)` mixes tokens"),
        "{}",
        r.message
    );
    assert!(
        r.notes[0].contains("dimension 1 is the sequence"),
        "{:?}",
        r.notes
    );
}

#[test]
fn a_running_sum_a_flip_and_a_shift() {
    refused(
        "let x = self.norm.forward(&x)?;",
        "let x = x.cumsum(1)?;",
        "AS0203",
    );
    refused(
        "let x = self.norm.forward(&x)?;",
        "let x = x.roll(1, 1)?;",
        "AS0203",
    );
    let source = edit(
        &llama(),
        "let x = self.norm.forward(&x)?;",
        "let x = x.flip(&[1])?;",
    );
    assert!(["AS0203", "AS0206"].contains(&refuse(&source)[0].code.id));
    refused(
        "let x = self.norm.forward(&x)?;",
        "let x = x.narrow(1, 1, seq_len - 1)?;",
        "AS0203",
    );
}

#[test]
fn a_mean_over_the_batch() {
    let r = refused(
        "let x = self.norm.forward(&x)?;",
        "let x = x.broadcast_sub(&x.mean_keepdim(0)?)?;",
        "AS0203",
    );
    assert!(
        r.message.contains("mixes rows of the batch"),
        "{}",
        r.message
    );
}

#[test]
fn an_unknown_call_on_a_shard() {
    let r = refused(
        "let x = self.norm.forward(&x)?;",
        "let x = elsewhere::blur(&x)?;",
        "AS0202",
    );
    assert!(r.message.contains("`elsewhere::blur(&x)`"), "{}", r.message);
    assert!(
        r.help
            .is_some_and(|h| h.contains("move `elsewhere::blur` into the annotated module"))
    );
}

#[test]
fn an_unknown_call_whose_result_does_not_matter_is_fine() {
    let source = edit(
        &llama(),
        "let x = self.norm.forward(&x)?;",
        "let x = self.norm.forward(&x)?;\n        elsewhere::log(&x);",
    );
    let analysis = autosp_compiler::analyse(&source).expect("valid Rust");
    assert!(analysis.refusals.is_empty());
}

#[test]
fn a_softmax_over_another_axis() {
    for (axis, word) in [("2", "dimension 2"), ("1", "dimension 1")] {
        let r = refused(
            "candle_nn::ops::softmax_last_dim(&scores)?",
            &format!("candle_nn::ops::softmax(&scores, {axis})?"),
            "AS0204",
        );
        assert!(r.message.contains(word), "{}", r.message);
    }
}

#[test]
fn a_size_that_cannot_be_classified() {
    let r = refused(
        "let q = self.q_proj.forward(x)?;",
        "elsewhere::reserve(seq_len);\n        let q = self.q_proj.forward(x)?;",
        "AS0205",
    );
    assert!(
        r.message.contains("shard or of the sequence"),
        "{}",
        r.message
    );
    refused(
        "let q = self.q_proj.forward(x)?;",
        "let odd = seq_len % 7;\n        let q = self.q_proj.forward(x)?;",
        "AS0205",
    );
}

#[test]
fn no_attention() {
    let source = edit(
        &llama(),
        "candle_nn::ops::softmax_last_dim(&scores)?",
        "scores.relu()?",
    );
    let refusals = refuse(&source);
    assert!(
        refusals
            .iter()
            .any(|r| ["AS0201", "AS0203", "AS0220"].contains(&r.code.id)),
        "{}",
        refusals[0].text(None)
    );
    let empty = refuse("pub struct Nothing;");
    assert_eq!(empty[0].code.id, "AS0201");
}

#[test]
fn missing_transposes() {
    // Heads would be mixed into the sequence.
    let r = refused(
        "let y = y\n            .transpose(1, 2)?\n",
        "let y = y\n",
        "AS0203",
    );
    assert!(
        r.help
            .is_some_and(|h| h.contains("transpose before the reshape"))
    );
    refused("q.matmul(&k.t()?)?", "q.matmul(&k)?", "AS0207");
    // All of them: attention between heads, token by token, is no attention over the sequence.
    let source = edit_n(
        &llama(),
        3,
        "            .transpose(1, 2)?\n            .contiguous()?;",
        "            .contiguous()?;",
    );
    let codes: Vec<&str> = refuse(&source).iter().map(|r| r.code.id).collect();
    assert!(
        codes
            .iter()
            .all(|c| ["AS0201", "AS0203", "AS0206", "AS0207"].contains(c)),
        "{codes:?}"
    );
}

#[test]
fn heads_of_one_operand_on_the_wrong_axis() {
    let source = edit(
        &llama(),
        "x.unsqueeze(2)?\n                .expand((b, kv_heads, repeats, seq_len, head_dim))?",
        "x.unsqueeze(3)?\n                .expand((b, kv_heads, seq_len, repeats, head_dim))?",
    );
    assert_eq!(refuse(&source)[0].code.id, "AS0203");
}

#[test]
fn dropout_and_random_numbers() {
    refused(
        "let weights = candle_nn::ops::softmax_last_dim(&scores)?;",
        "let weights = candle_nn::ops::softmax_last_dim(&scores)?;\n        let weights = candle_nn::ops::dropout(&weights, 0.1)?;",
        "AS0211",
    );
    refused(
        "let x = self.norm.forward(&x)?;",
        "let x = (&x + x.randn_like(0., 1.)?)?;",
        "AS0211",
    );
}

#[test]
fn scores_used_for_something_else() {
    refused(
        "let weights = candle_nn::ops::softmax_last_dim(&scores)?;",
        "let weights = candle_nn::ops::softmax_last_dim(&scores.exp()?)?;",
        "AS0209",
    );
    let source = edit(
        &llama(),
        "let y = weights.matmul(&v.contiguous()?)?.to_dtype(dtype)?;",
        "let y = (weights.matmul(&v.contiguous()?)? * weights.sum_all()?)?;",
    );
    assert_eq!(refuse(&source)[0].code.id, "AS0209");
}

#[test]
fn a_mask_that_is_not_a_rule() {
    let source = edit(
        &llama(),
        "cache.mask(seq_len)?.broadcast_as(scores.shape())?",
        "scores.zeros_like()?.gt(1.0)?",
    );
    assert!(["AS0209", "AS0208"].contains(&refuse(&source)[0].code.id));
    let source = edit(
        &llama(),
        "let mask = cache.mask(seq_len)?.broadcast_as(scores.shape())?;",
        "let mask = x.narrow(2, 0, 1)?.transpose(1, 2)?.unsqueeze(1)?.gt(0.0)?;",
    );
    let r = &refuse(&source)[0];
    assert_eq!(r.code.id, "AS0217", "{}", r.text(None));
    assert!(r.notes[0].contains("it comes out of"));
}

#[test]
fn the_tokens_are_read_to_the_host() {
    let source = edit(
        &llama(),
        "let mut x = self.embed_tokens.forward(x)?;",
        "let ids = x.to_vec2::<u32>()?;\n        let x = Tensor::new(ids, x.device())?;\n        let mut x = self.embed_tokens.forward(&x)?;",
    );
    assert!(!refuse(&source).is_empty());
}

#[test]
fn nothing_is_lost_on_the_way() {
    // A tuple from an unknown call, a list filled step by step, a struct built on the way, a macro, a number read to the host.
    refused(
        "let x = self.norm.forward(&x)?;",
        "let (x, _) = x.sort_last_dim(true)?;",
        "AS0202",
    );
    let norm = "let x = self.norm.forward(&x)?;";
    for (to, codes) in [
        (
            "let mut all = Vec::new();\n        all.push(x.clone());\n        let x = Tensor::cat(&all, 1)?;",
            ["AS0206", "AS0203"],
        ),
        (
            "let state = State { x };\n        let x = self.norm.forward(&state.x)?;",
            ["AS0206", "AS0206"],
        ),
        ("let x = mixed!(x);", ["AS0206", "AS0206"]),
        (
            "let x = loop { break self.norm.forward(&x)? };",
            ["AS0206", "AS0206"],
        ),
        (
            "let n = x.max_keepdim(2)?.to_vec1::<f32>()?[0];\n        let x = (x * f64::from(n))?;",
            ["AS0212", "AS0212"],
        ),
        (
            "let x = Tensor::cat(&vec![&x; 2], 1)?;",
            ["AS0203", "AS0203"],
        ),
        (
            "let n = vec![1.0; seq_len].iter().sum::<f64>();\n        let x = (self.norm.forward(&x)? * n)?;",
            ["AS0205", "AS0205"],
        ),
        (
            "let x = x.chunk(seq_len, 1)?[0].clone();",
            ["AS0206", "AS0203"],
        ),
        (
            "let x = x.transpose(1, 2)?.apply(&self.lm_head)?.transpose(1, 2)?;",
            ["AS0203", "AS0203"],
        ),
    ] {
        let source = edit(&llama(), norm, to);
        let first = &refuse(&source)[0];
        assert!(codes.contains(&first.code.id), "{to}: {}", first.text(None));
    }
}

#[test]
fn what_a_loop_writes_is_not_what_it_was_before() {
    let block = "            x = block.forward(&x, index_pos, layer, cache)?;\n";
    let before = "        for (layer, block) in self.blocks.iter().enumerate() {\n";
    // An option that is filled in the first round and used in the second: the branch must not be taken away.
    let option = edit(
        &llama(),
        before,
        &format!("        let mut past: Option<Tensor> = None;\n{before}"),
    );
    for write in ["past = Some(x.clone());", "past.replace(x.clone());"] {
        let source = edit(
            &option,
            block,
            &format!(
                "{block}            if let Some(p) = &past {{ x = (x + p)?; }}\n            {write}\n"
            ),
        );
        assert_eq!(refuse(&source)[0].code.id, "AS0206", "{write}");
    }
    // A flag and a counter: both branches are analysed and stay.
    let flag = edit(
        &llama(),
        before,
        &format!("        let (mut first, mut n) = (true, 0);\n{before}"),
    );
    let flag = edit(
        &flag,
        block,
        &format!(
            "{block}            if first || n == 3 {{ x = x.cumsum(1)?; }}\n            first = false;\n            n += 1;\n"
        ),
    );
    assert_eq!(refuse(&flag)[0].code.id, "AS0203");
}

#[test]
fn closures_and_macros_that_write_are_not_overlooked() {
    let norm = "let x = self.norm.forward(&x)?;";
    for to in [
        "let mut x = x;\n        self.blocks.iter().for_each(|b| x = b.mlp.forward(&x).unwrap());",
        "let mut x = x;\n        mixed!(x);",
        "let mut x = x;\n        for t in [&x.clone(), &x.cumsum(1)?] { x = t.clone(); }",
    ] {
        let code = refuse(&edit(&llama(), norm, to))[0].code.id;
        assert!(
            ["AS0202", "AS0203", "AS0206"].contains(&code),
            "{to}: {code}"
        );
    }
}

#[test]
fn a_field_that_a_setter_writes_is_no_cache() {
    // An adapter that is set before training takes part in the forward: both branches are analysed.
    let source = edit(
        &llama(),
        "    lm_head: Linear,\n    last_token_only: bool,\n}",
        "    lm_head: Linear,\n    last_token_only: bool,\n    shift: Option<Tensor>,\n}",
    );
    let source = edit(
        &source,
        "    /// Logits in f32:",
        "    pub fn set_shift(&mut self, shift: Tensor) {\n        self.shift = Some(shift);\n    }\n\n    /// Logits in f32:",
    );
    let norm = "let x = self.norm.forward(&x)?;";
    let used = |with: &str| {
        edit(
            &source,
            norm,
            &format!(
                "{norm}\n        let x = match &self.shift {{ Some(s) => {with}, None => x }};"
            ),
        )
    };
    assert_eq!(
        refuse(&used("x.broadcast_add(s)?.cumsum(1)?"))[0].code.id,
        "AS0203"
    );
    let analysis = autosp_compiler::analyse(&used("x.broadcast_add(s)?")).expect("valid Rust");
    assert!(
        analysis.refusals.is_empty(),
        "{}",
        analysis.refusals[0].text(None)
    );
    let edits = analysis.plan.twins.iter().flat_map(|t| &t.edits);
    let decided = edits
        .filter(|e| matches!(e.action, autosp_plan::plan::Action::Arm(_)))
        .count();
    assert_eq!(decided, 0, "the match stays as it is written");
}

#[test]
fn a_loop_that_turns_all_tokens_into_one() {
    let block = "            x = block.forward(&x, index_pos, layer, cache)?;\n";
    let one = format!("{block}            x = x.i((.., 0, ..))?.unsqueeze(1)?;\n");
    let first = &refuse(&edit(&llama(), block, &one))[0];
    assert_eq!(first.code.id, "AS0206", "{}", first.text(None));
    // The same token at every position is a shard again, with the gradient of its owner.
    let all = format!(
        "{block}            x = x.i((.., 0, ..))?.unsqueeze(1)?.broadcast_as(x.shape())?;\n"
    );
    let analysis = autosp_compiler::analyse(&edit(&llama(), block, &all)).expect("valid Rust");
    assert!(
        analysis.refusals.is_empty(),
        "{}",
        analysis.refusals[0].text(None)
    );
}

#[test]
fn every_refusal_ends_with_its_code() {
    let source = edit(
        &llama(),
        "let x = self.norm.forward(&x)?;",
        "let x = x.cumsum(1)?;",
    );
    let text = refuse(&source)[0].text(Some("llama.rs"));
    assert!(
        text.contains("= at: llama.rs:") && text.ends_with("[AS0203]"),
        "{text}"
    );
    assert!(autosp_plan::codes::find("as0203").is_some());
}

#[test]
fn a_deleted_row_makes_the_model_refuse() {
    let table = include_str!("../ops/candle.toml");
    let without = table.replace("names = [\"rope\"]\n", "names = [\"another_rope\"]\n");
    assert_ne!(table, without);
    let table: &'static autosp_compiler::ops::Table = Box::leak(Box::new(
        autosp_compiler::ops::Table::parse(&without).expect("a table"),
    ));
    let analysis = autosp_compiler::analyse_with(&llama(), table).expect("valid Rust");
    assert_eq!(analysis.refusals[0].code.id, "AS0202");
    assert!(analysis.refusals[0].message.contains("rope"));
}
