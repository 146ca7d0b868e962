//! Mutated models: some mean what they meant, others compute something else, which ranks have to compute too.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

/// Models that are renamed, reordered, inlined and outlined: their plans after each and after all of it, their numbers after all of
/// it.
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

/// What becomes of a change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Becomes {
    /// Refused when it is compiled, with this code.
    Refused(&'static str),
    /// Other numbers than the model's, on ranks as on one device.
    Compared,
}

use Becomes::{Compared, Refused};

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
    ("gemma_comparison", "gemma", Compared, "if i < j {", "if i + 1 < j {"),
    ("falcon_comparison", "falcon", Compared, "u8::from(j > i)", "u8::from(j > i + 3)"),
    ("mpt_comparison", "mpt", Compared, "u8::from(j > i)", "u8::from(j > i + 2)"),
    ("qwen2_window", "qwen2", Compared, "j + self.sliding_window < i", "j + self.sliding_window < i + 2"),
    ("phi3_window", "phi3", Compared, "i < j ", "i < j || j + 3 < i "),
    ("falcon_fill", "falcon", Compared, "mask, -1e9)?", "mask, -2.0)?"),
    ("bert_fill", "bert", Compared, "Tensor::try_from(f32::MIN)?", "Tensor::try_from(-1.5f32)?"),
    ("distilbert_fill", "distilbert", Compared, "&mask, f32::NEG_INFINITY)?", "&mask, -0.5)?"),
    // Transposes that are missing.
    ("phi3_transpose", "phi3", Refused("AS0203"),
        ".reshape((b_sz, q_len, self.num_kv_heads, self.head_dim))?\n            .transpose(1, 2)?",
        ".reshape((b_sz, self.num_kv_heads, q_len, self.head_dim))?"),
    ("mpt_transpose", "mpt", Refused("AS0207"), ".permute((0, 2, 3, 1))?", ".permute((0, 2, 1, 3))?"),
    ("distilbert_transpose", "distilbert", Refused("AS0203"), "context\n            .transpose(1, 2)?\n", "context\n"),
    ("gemma_transpose", "gemma", Refused("AS0203"), "attn_output\n            .transpose(1, 2)?\n", "attn_output\n"),
    // Tokens in another order, or summed.
    ("gemma_flip", "gemma", Refused("AS0203"), "let residual = xs;", "let xs = &xs.flip(&[1])?; let residual = xs;"),
    ("gemma_flip_width", "gemma", Compared, "let residual = xs;", "let xs = &xs.flip(&[2])?; let residual = xs;"),
    ("stable_lm_roll", "stable_lm", Refused("AS0203"), "let residual = xs;", "let xs = &xs.roll(1, 1)?; let residual = xs;"),
    ("llama_cumsum", "llama", Refused("AS0203"), "let residual = x;", "let x = &x.cumsum(1)?; let residual = x;"),
    ("llama_cumsum_width", "llama", Compared, "let residual = x;", "let x = &(x.cumsum(2)? * 0.1)?; let residual = x;"),
    ("llama_mean", "llama", Compared, "let residual = x;", "let x = &x.broadcast_sub(&x.mean_keepdim(1)?)?; let residual = x;"),
    ("bert_cumsum", "bert", Refused("AS0203"), "context_layer.flatten_from(candle::D::Minus2)?;", "context_layer.flatten_from(candle::D::Minus2)?.cumsum(1)?;"),
    // Positions of the keys alone: of both together nobody could tell.
    ("llama_rope_offset", "llama", Compared, "self.apply_rotary_emb(&k, index_pos, cache)?", "self.apply_rotary_emb(&k, index_pos + 1, cache)?"),
    ("qwen2_rope_offset", "qwen2", Compared, "candle_nn::rotary_emb::rope(&k.contiguous()?, &cos, &sin)?",
        "{ let cos = self.cos.narrow(0, seqlen_offset + 2, seq_len)?; let sin = self.sin.narrow(0, seqlen_offset + 2, seq_len)?; candle_nn::rotary_emb::rope(&k.contiguous()?, &cos, &sin)? }"),
    ("chatglm_rope_offset", "chatglm", Compared, "rotary_emb.apply(&key_layer, seqlen_offset)?", "rotary_emb.apply(&key_layer, seqlen_offset + 1)?"),
    ("gemma_rope_reversed", "gemma", Compared, "candle_nn::rotary_emb::rope(&k.contiguous()?, &cos, &sin)?", "candle_nn::rotary_emb::rope(&k.contiguous()?, &cos.flip(&[0])?, &sin)?"),
    ("stable_lm_rotation", "stable_lm", Compared, "&xs[1].neg()?, &xs[0]", "&xs[1], &xs[0]"),
    // Scales.
    ("chatglm_scale", "chatglm", Compared, "(matmul_result / self.norm_factor)?", "(matmul_result * self.norm_factor)?"),
    ("mpt_scale", "mpt", Compared, "* self.softmax_scale)?", "/ self.softmax_scale)?"),
];

/// Helpers put in the place of their calls: model, call, body.
const INLINED: [(&str, &str, &str); 11] = [
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
    ("qwen2", ROTATED, ROTATED_INLINE),
    ("gemma", ROTATED, ROTATED_INLINE),
    (
        "phi3",
        ROTATED,
        "{ let n = query_states.dim(2)?; let table = (self.rotary_emb.cos.narrow(0, seqlen_offset, n)?, self.rotary_emb.sin.narrow(0, seqlen_offset, n)?); (self.rotary_emb.rope(&query_states.contiguous()?, &table.0, &table.1)?, self.rotary_emb.rope(&key_states.contiguous()?, &table.0, &table.1)?) };",
    ),
    (
        "falcon",
        "rotate_half(query)?",
        "({ let l = query.dim(D::Minus1)?; Tensor::cat(&[&query.narrow(D::Minus1, l / 2, l - l / 2)?.neg()?, &query.narrow(D::Minus1, 0, l / 2)?], D::Minus1)? })",
    ),
    (
        "mpt",
        "masked_fill(\n                &attn_weights,\n                &mask.broadcast_as(attn_weights.shape())?,\n                f32::NEG_INFINITY,\n            )?",
        "{ let wide = mask.broadcast_as(attn_weights.shape())?; let fill = Tensor::new(f32::NEG_INFINITY, attn_weights.device())?.broadcast_as(wide.shape().dims())?; wide.where_cond(&fill, &attn_weights)? }",
    ),
    (
        "chatglm",
        "masked_fill(\n                &matmul_result,\n                &mask.broadcast_left((matmul_result.dim(0)?, matmul_result.dim(1)?))?,\n                f32::NEG_INFINITY,\n            )?",
        "{ let wide = mask.broadcast_left((matmul_result.dim(0)?, matmul_result.dim(1)?))?; let fill = Tensor::new(f32::NEG_INFINITY, matmul_result.device())?.broadcast_as(wide.shape().dims())?; wide.where_cond(&fill, &matmul_result)? }",
    ),
    (
        "stable_lm",
        "rotate_half(q)?",
        "({ let halves = q.chunk(2, D::Minus1)?; Tensor::cat(&[&halves[1].neg()?, &halves[0]], D::Minus1)? })",
    ),
    (
        "bert",
        "self.transpose_for_scores(&query_layer)?",
        "{ let mut shape = query_layer.dims().to_vec(); shape.pop(); shape.push(self.num_attention_heads); shape.push(self.attention_head_size); query_layer.reshape(shape.as_slice())?.transpose(1, 2)?.contiguous()? }",
    ),
    (
        "distilbert",
        "masked_fill(&scores.to_dtype(DType::F32)?, &mask, f32::NEG_INFINITY)?",
        "{ let scores = scores.to_dtype(DType::F32)?; let fill = Tensor::new(f32::NEG_INFINITY, scores.device())?.broadcast_as(mask.shape().dims())?; mask.where_cond(&fill, &scores)? }",
    ),
];

const ROTATED: &str = "self.rotary_emb\n                .apply_rotary_emb_qkv(&query_states, &key_states, seqlen_offset)?;";
const ROTATED_INLINE: &str = "{ let (_, _, n, _) = query_states.dims4()?; let cos = self.rotary_emb.cos.narrow(0, seqlen_offset, n)?; let sin = self.rotary_emb.sin.narrow(0, seqlen_offset, n)?; (candle_nn::rotary_emb::rope(&query_states.contiguous()?, &cos, &sin)?, candle_nn::rotary_emb::rope(&key_states.contiguous()?, &cos, &sin)?) };";

/// Calls of new helpers in the place of what they compute: what is replaced, and the call.
const OUTLINED: [(&str, &str); 3] = [
    ("candle_nn::ops::softmax_last_dim(", "outlined_softmax("),
    ("candle_nn::ops::softmax(", "outlined_softmax_along("),
    (
        "query_states\n            .reshape((b_sz, q_len, self.num_heads, self.head_dim))?\n            .transpose(1, 2)?;",
        "outlined_heads(&query_states, (b_sz, q_len, self.num_heads, self.head_dim))?;",
    ),
];

/// The new helpers.
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

/// One file for `tests/mutants.rs`: modules, a line of test for each, and all sources.
pub fn write(models: &Path, file_of: &HashMap<String, String>, out: &Path) {
    let text = |model: &str| {
        let file = file_of.get(model).expect("a model of models.txt");
        std::fs::read_to_string(models.join(file)).expect("a model file")
    };
    let (mut annotated, mut plain, mut tests) = (String::new(), String::new(), String::new());
    let (mut refused, mut pairs) = (String::new(), String::new());
    let mut originals: Vec<&str> = Vec::new();
    for model in KEPT {
        let original = text(model);
        let mutant = kept(model, &original);
        for (way, mutated) in WAYS {
            let text = mutated(model, &original);
            assert_ne!(text.replace(HELPERS, ""), original, "{model} is not {way}");
            let _ = write!(pairs, "(\"{model}, {way}\", {original:?}, {text:?}),");
        }
        let _ = write!(pairs, "({model:?}, {original:?}, {mutant:?}),");
        annotated += &super::annotated(&format!("{model}_kept"), &mutant);
        let _ = writeln!(tests, "kept!({model}_kept, {model});");
        originals.push(model);
    }
    for (name, model, becomes, from, to) in CHANGED {
        let original = text(model);
        assert!(original.contains(from), "{model} has no `{from}`");
        let mutant = original.replacen(from, to, 1);
        match becomes {
            Refused(code) => {
                let _ = write!(refused, "({name:?}, {code:?}, {mutant:?}),");
            }
            Compared => {
                annotated += &super::annotated(name, &mutant);
                plain += &super::plain(name, &mutant);
                let _ = writeln!(tests, "changed!({name}, {model});");
                originals.push(model);
            }
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

/// A way to write a model otherwise: what it is called, and the text after it.
type Way = (&'static str, fn(&str, &str) -> String);

const WAYS: [Way; 4] = [
    ("renamed", renamed),
    ("reordered", |_, text| reversed(text)),
    ("inlined", inlined),
    ("outlined", outlined),
];

/// The same model, written otherwise in every way at once.
fn kept(model: &str, text: &str) -> String {
    reversed(&renamed(model, &outlined(model, &inlined(model, text))))
}

fn inlined(model: &str, text: &str) -> String {
    let mut text = text.to_string();
    for (_, from, to) in INLINED.iter().filter(|(m, _, _)| *m == model) {
        assert!(text.contains(from), "{model} has no `{from}`");
        text = text.replacen(from, to, 1);
    }
    text
}

fn outlined(_: &str, text: &str) -> String {
    let text = OUTLINED
        .iter()
        .fold(text.to_string(), |text, (from, to)| text.replace(from, to));
    text + HELPERS
}

fn renamed(_: &str, text: &str) -> String {
    RENAMED.iter().fold(text.to_string(), |text, word| {
        rename(&text, word, &format!("renamed_{word}"))
    })
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
