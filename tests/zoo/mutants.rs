//! Mutated models: some mean what they meant, others compute something else, which ranks have to compute too.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

/// Models that are renamed, reordered, outlined and inlined, all at once. The numbers of the first ones are tested by default.
const KEPT: [&str; 10] = [
    "llama",
    "chatglm",
    "bert",
    "qwen2",
    "gemma",
    "phi3",
    "falcon",
    "mpt",
    "stable_lm",
    "distilbert",
];
const KEPT_BY_DEFAULT: usize = 2;

/// What becomes of a change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Becomes {
    /// Refused when it is compiled, with this code.
    Refused(&'static str),
    /// The same numbers as on one device. Tested by default, or only with the feature `mutants`.
    Compared { by_default: bool },
}

use Becomes::Refused;
const ALWAYS: Becomes = Becomes::Compared { by_default: true };
const ON_DEMAND: Becomes = Becomes::Compared { by_default: false };

/// Name, model, what becomes of it, the text that is replaced where it stands first, and the new text.
type Row = (
    &'static str,
    &'static str,
    Becomes,
    &'static str,
    &'static str,
);

const CHANGED: &[Row] = &[
    // The softmax.
    ("qwen2_softmax_axis", "qwen2", Refused("AS0204"), "ops::softmax_last_dim(&attn_weights)", "ops::softmax(&attn_weights, 2)"),
    ("bert_softmax_axis", "bert", Refused("AS0204"), "(&attention_scores, candle::D::Minus1)", "(&attention_scores, 1)"),
    // The mask: its comparison, its window, its fill.
    ("gemma_comparison", "gemma", ALWAYS, "if i < j {", "if i + 1 < j {"),
    ("falcon_comparison", "falcon", ON_DEMAND, "u8::from(j > i)", "u8::from(j > i + 3)"),
    ("mpt_comparison", "mpt", ON_DEMAND, "u8::from(j > i)", "u8::from(j > i + 2)"),
    ("qwen2_window", "qwen2", ALWAYS, "j + self.sliding_window < i", "j + self.sliding_window < i + 2"),
    ("phi3_window", "phi3", ON_DEMAND, "i < j ", "i < j || j + 3 < i "),
    ("falcon_fill", "falcon", ON_DEMAND, "mask, -1e9)?", "mask, -2.0)?"),
    ("bert_fill", "bert", ALWAYS, "Tensor::try_from(f32::MIN)?", "Tensor::try_from(-1.5f32)?"),
    ("distilbert_fill", "distilbert", ON_DEMAND, "&mask, f32::NEG_INFINITY)?", "&mask, -0.5)?"),
    // Transposes that are missing.
    ("phi3_transpose", "phi3", Refused("AS0203"),
        ".reshape((b_sz, q_len, self.num_kv_heads, self.head_dim))?\n            .transpose(1, 2)?",
        ".reshape((b_sz, self.num_kv_heads, q_len, self.head_dim))?"),
    ("mpt_transpose", "mpt", Refused("AS0207"), ".permute((0, 2, 3, 1))?", ".permute((0, 2, 1, 3))?"),
    ("distilbert_transpose", "distilbert", Refused("AS0203"), "context\n            .transpose(1, 2)?\n", "context\n"),
    ("gemma_transpose", "gemma", Refused("AS0203"), "attn_output\n            .transpose(1, 2)?\n", "attn_output\n"),
    // Tokens in another order, or summed.
    ("gemma_flip", "gemma", Refused("AS0203"), "let residual = xs;", "let xs = &xs.flip(&[1])?; let residual = xs;"),
    ("gemma_flip_width", "gemma", ON_DEMAND, "let residual = xs;", "let xs = &xs.flip(&[2])?; let residual = xs;"),
    ("stable_lm_roll", "stable_lm", Refused("AS0203"), "let residual = xs;", "let xs = &xs.roll(1, 1)?; let residual = xs;"),
    ("llama_cumsum", "llama", Refused("AS0203"), "let residual = x;", "let x = &x.cumsum(1)?; let residual = x;"),
    ("llama_cumsum_width", "llama", ON_DEMAND, "let residual = x;", "let x = &(x.cumsum(2)? * 0.1)?; let residual = x;"),
    ("llama_mean", "llama", ON_DEMAND, "let residual = x;", "let x = &x.broadcast_sub(&x.mean_keepdim(1)?)?; let residual = x;"),
    ("bert_cumsum", "bert", Refused("AS0203"), "context_layer.flatten_from(candle::D::Minus2)?;", "context_layer.flatten_from(candle::D::Minus2)?.cumsum(1)?;"),
    // Positions of the keys alone: of both together nobody could tell.
    ("llama_rope_offset", "llama", ALWAYS, "self.apply_rotary_emb(&k, index_pos, cache)?", "self.apply_rotary_emb(&k, index_pos + 1, cache)?"),
    ("qwen2_rope_offset", "qwen2", ON_DEMAND, "candle_nn::rotary_emb::rope(&k.contiguous()?, &cos, &sin)?",
        "{ let cos = self.cos.narrow(0, seqlen_offset + 2, seq_len)?; let sin = self.sin.narrow(0, seqlen_offset + 2, seq_len)?; candle_nn::rotary_emb::rope(&k.contiguous()?, &cos, &sin)? }"),
    ("chatglm_rope_offset", "chatglm", ON_DEMAND, "rotary_emb.apply(&key_layer, seqlen_offset)?", "rotary_emb.apply(&key_layer, seqlen_offset + 1)?"),
    ("gemma_rope_reversed", "gemma", ON_DEMAND, "candle_nn::rotary_emb::rope(&k.contiguous()?, &cos, &sin)?", "candle_nn::rotary_emb::rope(&k.contiguous()?, &cos.flip(&[0])?, &sin)?"),
    ("stable_lm_rotation", "stable_lm", ON_DEMAND, "&xs[1].neg()?, &xs[0]", "&xs[1], &xs[0]"),
    // Scales.
    ("chatglm_scale", "chatglm", ON_DEMAND, "(matmul_result / self.norm_factor)?", "(matmul_result * self.norm_factor)?"),
    ("mpt_scale", "mpt", ON_DEMAND, "* self.softmax_scale)?", "/ self.softmax_scale)?"),
];

/// Parts of the models written otherwise: helpers put in the place of their calls, and calls of new helpers.
const REWRITTEN: &[(&str, &str, &str)] = &[
    (
        "llama",
        "self.apply_rotary_emb(&q, index_pos, cache)?",
        "{ let (_, _, n, _) = q.dims4()?; candle_nn::rotary_emb::rope(&q, &cache.cos.narrow(0, index_pos, n)?, &cache.sin.narrow(0, index_pos, n)?)? }",
    ),
    (
        "llama",
        "masked_fill(&att, &mask, f32::NEG_INFINITY)?",
        "{ let fill = Tensor::new(f32::NEG_INFINITY, att.device())?.broadcast_as(mask.shape().dims())?; mask.where_cond(&fill, &att)? }",
    ),
    (
        "bert",
        "self.transpose_for_scores(&query_layer)?",
        "{ let mut shape = query_layer.dims().to_vec(); shape.pop(); shape.push(self.num_attention_heads); shape.push(self.attention_head_size); query_layer.reshape(shape.as_slice())?.transpose(1, 2)?.contiguous()? }",
    ),
    (
        "falcon",
        "rotate_half(query)?",
        "({ let l = query.dim(D::Minus1)?; Tensor::cat(&[&query.narrow(D::Minus1, l / 2, l - l / 2)?.neg()?, &query.narrow(D::Minus1, 0, l / 2)?], D::Minus1)? })",
    ),
    (
        "stable_lm",
        "rotate_half(q)?",
        "({ let halves = q.chunk(2, D::Minus1)?; Tensor::cat(&[&halves[1].neg()?, &halves[0]], D::Minus1)? })",
    ),
    (
        "distilbert",
        "masked_fill(&scores.to_dtype(DType::F32)?, &mask, f32::NEG_INFINITY)?",
        "{ let scores = scores.to_dtype(DType::F32)?; let fill = Tensor::new(f32::NEG_INFINITY, scores.device())?.broadcast_as(mask.shape().dims())?; mask.where_cond(&fill, &scores)? }",
    ),
    ("qwen2", HEADS, OUTLINED_HEADS),
    ("gemma", HEADS, OUTLINED_HEADS),
    ("phi3", HEADS, OUTLINED_HEADS),
];

const HEADS: &str = "query_states\n            .reshape((b_sz, q_len, self.num_heads, self.head_dim))?\n            .transpose(1, 2)?;";
const OUTLINED_HEADS: &str =
    "outlined_heads(&query_states, (b_sz, q_len, self.num_heads, self.head_dim))?;";

/// New helpers, for whoever calls them.
const HELPERS: &str = "
fn outlined_softmax(scores: &Tensor) -> Result<Tensor> { let kept = scores; candle_nn::ops::softmax_last_dim(kept) }
fn outlined_softmax_along(scores: &Tensor, along: candle::D) -> Result<Tensor> { candle_nn::ops::softmax(scores, along) }
fn outlined_heads(x: &Tensor, sizes: (usize, usize, usize, usize)) -> Result<Tensor> { x.reshape(sizes)?.transpose(1, 2) }
";

/// Locals that get another name.
const RENAMED: [&str; 9] = [
    "xs",
    "query_states",
    "key_states",
    "attn_weights",
    "attention_mask",
    "seq_len",
    "b_sz",
    "mask",
    "query_layer",
];

/// One file for `tests/mutants.rs`: modules, a line of test for each, and all sources. With `all`, the numbers of every mutant.
pub fn write(models: &Path, file_of: &HashMap<String, String>, out: &Path, all: bool) {
    let text = |model: &str| {
        let file = file_of.get(model).expect("a model of models.txt");
        std::fs::read_to_string(models.join(file)).expect("a model file")
    };
    let (mut annotated, mut plain, mut tests) = (String::new(), String::new(), String::new());
    let (mut refused, mut pairs) = (String::new(), String::new());
    let mut originals: Vec<&str> = Vec::new();
    for (i, model) in KEPT.into_iter().enumerate() {
        let original = text(model);
        let mutant = kept(model, &original);
        let _ = write!(pairs, "({model:?}, {original:?}, {mutant:?}),");
        if all || i < KEPT_BY_DEFAULT {
            annotated += &super::annotated(&format!("{model}_kept"), &mutant);
            let _ = writeln!(tests, "kept!({model}_kept, {model});");
            originals.push(model);
        }
    }
    for (name, model, becomes, from, to) in CHANGED {
        let original = text(model);
        assert!(original.contains(from), "{model} has no `{from}`");
        let mutant = original.replacen(from, to, 1);
        match becomes {
            Refused(code) => {
                let _ = write!(refused, "({name:?}, {code:?}, {mutant:?}),");
            }
            Becomes::Compared { by_default } if all || *by_default => {
                annotated += &super::annotated(name, &mutant);
                plain += &super::plain(name, &mutant);
                let _ = writeln!(tests, "changed!({name}, {model});");
                originals.push(model);
            }
            Becomes::Compared { .. } => {}
        }
    }
    originals.sort_unstable();
    originals.dedup();
    for model in originals {
        plain += &super::plain(model, &text(model));
    }
    let file = format!(
        "pub mod models {{\npub use candle_transformers::models::with_tracing;\n{annotated}}}\npub use candle_transformers::utils;\n\
         pub mod slow {{\npub mod models {{\npub use autosp_zoo::slow::models::with_tracing;\n{plain}}}\npub use autosp_zoo::slow::utils;\n}}\n\
         {tests}\nconst REFUSED: &[(&str, &str, &str)] = &[{refused}];\nconst PAIRS: &[(&str, &str, &str)] = &[{pairs}];\n"
    );
    std::fs::write(out.join("mutants.rs"), file).expect("a file in OUT_DIR");
}

/// The same model, written otherwise.
fn kept(model: &str, text: &str) -> String {
    let mut text = text.to_string();
    for (_, from, to) in REWRITTEN.iter().filter(|(m, _, _)| *m == model) {
        assert!(text.contains(from), "{model} has no `{from}`");
        text = text.replacen(from, to, 1);
    }
    text = text
        .replace("candle_nn::ops::softmax_last_dim(", "outlined_softmax(")
        .replace("candle_nn::ops::softmax(", "outlined_softmax_along(");
    for word in RENAMED {
        text = rename(&text, word, &format!("renamed_{word}"));
    }
    reversed(&text) + HELPERS
}

/// Replaces whole words.
fn rename(text: &str, from: &str, to: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(from) {
        let word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        let whole =
            !word(rest[..at].chars().last()) && !word(rest[at + from.len()..].chars().next());
        out += &rest[..at];
        out += if whole { to } else { from };
        rest = &rest[at + from.len()..];
    }
    out + rest
}

/// The items of a formatted file from the last to the first, behind its documentation and its `use`s.
fn reversed(text: &str) -> String {
    let (mut head, mut items, mut item) = (String::new(), Vec::new(), String::new());
    for line in text.lines() {
        if line.starts_with("//!") {
            head = head + line + "\n";
            continue;
        }
        item = item + line + "\n";
        let outside = !line.starts_with([' ', '#']) && !line.starts_with("//");
        let whole = line.matches('{').count() == line.matches('}').count();
        // The last line of an item: `}`, or all of it in one line.
        if outside && (line.starts_with('}') || (whole && line.ends_with([';', '}']))) {
            let item = std::mem::take(&mut item);
            if item.trim_start().starts_with("use ") {
                head += &item;
            } else {
                items.push(item);
            }
        }
    }
    items.reverse();
    head + &items.concat() + &item
}
