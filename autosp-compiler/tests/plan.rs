//! The plan of the example Llama; edits that keep its meaning keep the plan, edits that change it change the plan.

mod common;

use autosp_plan::plan::{Action, HeadMap, Plan, Tiled};
use common::{edit, edit_n, llama};

fn plan(source: &str) -> Plan {
    let analysis = autosp_compiler::analyse(source).expect("valid Rust");
    let refusals: Vec<String> = analysis
        .refusals
        .iter()
        .map(|r| format!("{}: {}", r.line(), r.text(None)))
        .collect();
    assert!(refusals.is_empty(), "{}", refusals.join("\n"));
    analysis.plan
}

/// What a plan says apart from names, lines and places in the source.
#[derive(Debug, PartialEq)]
struct Gist {
    layouts: Vec<(String, String, String)>,
    heads: Vec<HeadMap>,
    unrepeated: Vec<bool>,
    masks: Vec<String>,
    scopes: Vec<bool>,
    inputs: Vec<Vec<usize>>,
    offsets: Vec<usize>,
}

fn gist(source: &str) -> Gist {
    let plan = plan(source);
    Gist {
        layouts: plan
            .sites
            .iter()
            .map(|s| (s.layout.q.clone(), s.layout.k.clone(), s.layout.v.clone()))
            .collect(),
        heads: plan.sites.iter().map(|s| s.heads).collect(),
        unrepeated: plan.sites.iter().map(|s| s.unrepeated).collect(),
        masks: plan.sites.iter().map(|s| s.mask.clone()).collect(),
        scopes: plan.blocks.iter().map(|b| b.scope.is_some()).collect(),
        inputs: plan
            .roots
            .iter()
            .map(|r| r.inputs.iter().map(|i| i.1).collect())
            .collect(),
        offsets: plan.roots.iter().map(|r| r.offsets.len()).collect(),
    }
}

#[test]
fn the_llama_has_one_site_one_scope_and_one_root() {
    let plan = plan(&llama());
    let [site] = plan.sites.as_slice() else {
        panic!("{} sites", plan.sites.len())
    };
    assert_eq!(site.function, "Attention::forward");
    assert_eq!(
        (
            site.layout.q.as_str(),
            site.layout.k.as_str(),
            site.layout.v.as_str()
        ),
        ("b h s d", "b g d s", "b g s d")
    );
    assert_eq!(site.heads, HeadMap::Blocked);
    assert!(
        site.unrepeated,
        "key and value heads travel once, not once per query head"
    );
    assert_eq!(site.mask, "causal: key <= query");
    assert!(site.operands.k.contains("num_kv_heads") && site.operands.q.contains("num_heads"));
    let [block] = plan.blocks.as_slice() else {
        panic!("{} blocks", plan.blocks.len())
    };
    assert_eq!(
        block.scope.as_deref(),
        Some("block.forward(&x, index_pos, layer, cache)")
    );
    let [root] = plan.roots.as_slice() else {
        panic!("{} roots", plan.roots.len())
    };
    assert_eq!(root.function, "Llama::forward");
    assert_eq!(root.inputs, [("x".to_string(), 1)]);
    assert_eq!(root.offsets, ["index_pos"]);
}

#[test]
fn a_module_in_a_file_is_named() {
    let source = format!("#[autosp::sequence_parallel]\nmod llama {{ {} }}", llama());
    assert_eq!(plan(&source).sites[0].function, "llama::Attention::forward");
}

/// Replaces whole words.
fn rename(source: &str, pairs: &[(&str, &str)]) -> String {
    let mut out = String::new();
    let mut word = String::new();
    let flush = |word: &mut String, out: &mut String| {
        let new = pairs
            .iter()
            .find(|(from, _)| from == word)
            .map_or(word.as_str(), |(_, to)| to);
        out.push_str(new);
        word.clear();
    };
    for c in source.chars() {
        if c.is_alphanumeric() || c == '_' {
            word.push(c);
        } else {
            flush(&mut word, &mut out);
            out.push(c);
        }
    }
    flush(&mut word, &mut out);
    out
}

#[test]
fn names_do_not_matter() {
    let names = [
        ("scores", "a"),
        ("weights", "probabilities"),
        ("seq_len", "n"),
        ("rotate", "turn"),
        ("masked_fill", "hide"),
        ("repeat_kv", "widen"),
        ("Attention", "Mixer"),
        ("Cache", "Tables"),
        ("kvs", "past"),
        ("masks", "memo"),
        ("q", "query"),
        ("k", "key"),
        ("v", "value"),
        ("num_heads", "n_head"),
        ("num_kv_heads", "n_head_kv"),
        ("blocks", "layers"),
        ("forward", "run"),
    ];
    // `forward` of candle's own layers keeps its name: those are `.forward(x)` on fields of library types.
    let renamed = rename(&llama(), &names[..names.len() - 1]);
    assert_eq!(gist(&renamed), gist(&llama()));
}

#[test]
fn the_order_of_independent_statements_does_not_matter() {
    let source = llama();
    let swapped = edit(
        &source,
        "        let k = self.k_proj.forward(x)?;\n        let v = self.v_proj.forward(x)?;\n",
        "        let v = self.v_proj.forward(x)?;\n        let k = self.k_proj.forward(x)?;\n",
    );
    let swapped = edit(
        &swapped,
        "        let k = self.repeat_kv(k)?;\n        let v = self.repeat_kv(v)?;\n",
        "        let v = self.repeat_kv(v)?;\n        let k = self.repeat_kv(k)?;\n",
    );
    assert_eq!(gist(&swapped), gist(&source));
}

#[test]
fn helpers_can_be_inlined() {
    let source = llama();
    let inlined = edit(
        &source,
        "masked_fill(&scores, &mask, f32::NEG_INFINITY)?",
        "let hidden = Tensor::new(f32::NEG_INFINITY, scores.device())?.broadcast_as(mask.shape())?;\n mask.where_cond(&hidden, &scores)?",
    );
    let inlined = edit(
        &inlined,
        "let q = self.rotate(&q, index_pos, cache)?;",
        "let cos = cache.cos.narrow(0, index_pos, seq_len)?;\n let sin = cache.sin.narrow(0, index_pos, seq_len)?;\n let q = candle_nn::rotary_emb::rope(&q, &cos, &sin)?;",
    );
    assert_eq!(gist(&inlined), gist(&source));
    // The repetition of heads, once as one expression and once step by step.
    let steps = edit(
        &inlined,
        "        let k = self.repeat_kv(k)?;\n",
        "        let n = self.num_heads / self.num_kv_heads;\n        let (kb, kh, ks, kd) = k.dims4()?;\n        let k = k.unsqueeze(2)?;\n        let k = k.expand((kb, kh, n, ks, kd))?;\n        let k = k.reshape((kb, kh * n, ks, kd))?;\n",
    );
    assert_eq!(gist(&steps), gist(&source));
}

#[test]
fn helpers_can_be_outlined() {
    let source = llama();
    let outlined = edit(
        &source,
        "let scores = (q.matmul(&k.t()?)? / (self.head_dim as f64).sqrt())?;",
        "let scores = self.product(&q, &k)?;",
    );
    let outlined = edit(
        &outlined,
        "    fn repeat_kv(",
        "    fn product(&self, q: &Tensor, k: &Tensor) -> Result<Tensor> {\n        let raw = q.matmul(&k.t()?)?;\n        raw / (self.head_dim as f64).sqrt()\n    }\n\n    fn repeat_kv(",
    );
    let outlined = edit(
        &outlined,
        "let weights = candle_nn::ops::softmax_last_dim(&scores)?;\n        let y = weights.matmul(&v.contiguous()?)?.to_dtype(dtype)?;",
        "let y = mix(&scores, &v)?.to_dtype(dtype)?;",
    );
    let outlined = edit(
        &outlined,
        "fn masked_fill(",
        "fn mix(scores: &Tensor, v: &Tensor) -> Result<Tensor> {\n    let weights = candle_nn::ops::softmax(scores, candle_core::D::Minus1)?;\n    weights.matmul(&v.contiguous()?)\n}\n\nfn masked_fill(",
    );
    assert_eq!(gist(&outlined), gist(&source));
}

#[test]
fn written_with_apply_and_functions_it_is_the_same() {
    let source = llama();
    let other = edit(&source, "self.o_proj.forward(&y)", "y.apply(&self.o_proj)");
    let other = edit(
        &other,
        "let x = self.input_norm.forward(x)?;",
        "let x = x.apply(&self.input_norm)?;",
    );
    let other = edit(
        &other,
        "(q.matmul(&k.t()?)? /",
        "(Tensor::matmul(&q, &k.t()?)? /",
    );
    let other = edit(
        &other,
        "weights.matmul(&v.contiguous()?)?",
        "Tensor::matmul(&weights, &v.contiguous()?)?",
    );
    assert_eq!(gist(&other), gist(&source));
}

#[test]
fn another_comparison_is_another_mask() {
    let mask = |rule: &str| {
        plan(&edit(&llama(), "u8::from(j > i)", rule)).sites[0]
            .mask
            .clone()
    };
    assert_eq!(
        mask("u8::from(j >= i)"),
        "0 where key - query <= -1, 1 elsewhere"
    );
    assert_eq!(mask("u8::from(i < j)"), "causal: key <= query");
    assert_eq!(mask("u8::from(!(j <= i))"), "causal: key <= query");
    assert_eq!(
        mask("u8::from(j > i || j + 16 < i)"),
        "0 where -16 <= key - query <= 0, 1 elsewhere"
    );
    assert_eq!(
        mask("u8::from(j + 3 > i)"),
        "0 where key - query <= -3, 1 elsewhere"
    );
    assert_eq!(
        mask("u8::from(i > j)"),
        "1 where key - query <= -1, 0 elsewhere"
    );
    // No band: the closure itself is evaluated.
    assert_eq!(
        mask("u8::from(j > i && j % 2 == 0)"),
        "a rule over (query, key), evaluated tile by tile"
    );
    // Two elements of a list may differ.
    let source = edit(
        &llama(),
        "    kvs: Vec<Option",
        "    documents: Vec<u32>,\n    kvs: Vec<Option",
    );
    for rule in [
        "u8::from(j > i || self.documents[j] != self.documents[i])",
        "u8::from(j > i + self.documents[i] as usize)",
    ] {
        let source = edit(&source, "u8::from(j > i)", rule);
        assert_eq!(
            plan(&source).sites[0].mask,
            "a rule over (query, key), evaluated tile by tile",
            "{rule}"
        );
    }
}

#[test]
fn interleaved_heads_are_told_from_blocked_ones() {
    let source = llama();
    let interleaved = edit(
        &source,
        "x.unsqueeze(2)?\n                .expand((b, kv_heads, repeats, seq_len, head_dim))?",
        "x.unsqueeze(1)?\n                .expand((b, repeats, kv_heads, seq_len, head_dim))?",
    );
    assert_eq!(plan(&interleaved).sites[0].heads, HeadMap::Interleaved);
}

#[test]
fn repeated_heads_whose_sizes_are_read_are_exchanged_as_they_are() {
    let source = edit_n(
        &llama(),
        1,
        "        let v = self.repeat_kv(v)?;\n",
        "        let v = self.repeat_kv(v)?;\n        let all = v.dim(1)?;\n        assert!(all > 0);\n",
    );
    assert!(!plan(&source).sites[0].unrepeated);
}

#[test]
fn a_struct_that_is_not_clone_gets_no_scope() {
    let source = edit(
        &llama(),
        "#[derive(Debug, Clone)]\nstruct Block {",
        "#[derive(Debug)]\nstruct Block {",
    );
    let plan = plan(&source);
    assert_eq!(plan.blocks[0].scope, None);
    assert!(
        plan.blocks[0]
            .why_none
            .as_deref()
            .is_some_and(|w| w.contains("`Block` is not `Clone`"))
    );
}

#[test]
fn an_attention_alone_in_its_module_takes_hidden_states() {
    let source = llama();
    let end = source
        .find("#[derive(Debug, Clone)]\nstruct Mlp")
        .expect("the end of the attention");
    let alone = edit(
        &source[..end],
        "    fn forward(\n        &self,\n        x: &Tensor,\n        index_pos",
        "    pub fn forward(\n        &self,\n        x: &Tensor,\n        index_pos",
    );
    let plan = plan(&alone);
    assert_eq!(plan.roots[0].function, "Attention::forward");
    assert_eq!(plan.roots[0].inputs, [("x".to_string(), 1)]);
    assert!(plan.blocks.is_empty());
}

#[test]
fn a_gpt_2_with_fused_projections_and_learned_positions_is_followed() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/models/gpt2.rs");
    let plan = plan(&std::fs::read_to_string(path).expect("the example model"));
    let [site] = plan.sites.as_slice() else {
        panic!("{} sites", plan.sites.len())
    };
    assert_eq!(
        (
            site.layout.q.as_str(),
            site.layout.k.as_str(),
            site.layout.v.as_str()
        ),
        ("b h s d", "b g d s", "b g s d")
    );
    assert_eq!(site.mask, "causal: key <= query");
    assert!(plan.blocks[0].scope.is_some());
}

/// The block's checkpoint: whether its input is read nowhere else; and the calls that run in tiles.
fn scopes(source: &str) -> (Vec<bool>, Vec<Tiled>) {
    let plan = plan(source);
    let edits = plan.twins.iter().flat_map(|twin| &twin.edits);
    let (mut last, mut tiled) = (Vec::new(), Vec::new());
    for edit in edits {
        match &edit.action {
            Action::Checkpoint(scope) => last.push(scope.last),
            Action::Tiled(call) => tiled.push(*call),
            _ => {}
        }
    }
    (last, tiled)
}

#[test]
fn a_block_takes_the_memory_of_an_input_that_nobody_else_reads() {
    assert_eq!(scopes(&llama()).0, [true]);
    let call = "x = block.forward(&x, index_pos, layer, cache)?;";
    for also in [
        "let kept = x.clone(); x = block.forward(&x, index_pos, layer, cache)?; drop(kept);",
        "assert!(x.rank() == 3); x = block.forward(&x, index_pos, layer, cache)?;",
        "println!(\"{x:?}\"); x = block.forward(&x, index_pos, layer, cache)?;",
    ] {
        assert_eq!(scopes(&edit(&llama(), call, also)).0, [false], "{also}");
    }
    let other = "let y = block.forward(&x, index_pos, layer, cache)?; x = y;";
    assert_eq!(scopes(&edit(&llama(), call, other)).0, [true]);
}

#[test]
fn a_part_that_computes_by_token_runs_in_tiles() {
    let mlp = Tiled {
        dim: 1,
        by_ref: true,
    };
    assert_eq!(scopes(&llama()).1, [mlp]);
    // What asks for the whole sequence does not.
    let call = "self.down_proj.forward(&x)";
    let whole = "self.down_proj.forward(&(x * (seq(&x)? as f64))?)";
    let source = edit(&llama(), call, whole);
    let source = format!("{source}\nfn seq(x: &Tensor) -> Result<usize> {{ x.dim(1) }}\n");
    assert_eq!(scopes(&source).1, []);
    // A layer that cannot be cloned cannot be kept.
    let derive = "#[derive(Debug, Clone)]\nstruct Mlp";
    let source = edit(&llama(), derive, "#[derive(Debug)]\nstruct Mlp");
    assert_eq!(scopes(&source).1, []);
}
