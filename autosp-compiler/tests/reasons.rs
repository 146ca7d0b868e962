//! Models that cannot be sharded: what is said first is true of the model, and names the line, the operation and a way out.

mod common;

use common::packages::models;

const RECURRENCE: &str = "one after another";
const CONVOLUTION: &str = "the tokens at the ends of a shard need those of the shards beside it";
const BIAS: &str = "a bias between each two tokens";

#[test]
#[allow(clippy::too_many_lines, reason = "one entry for each model")]
fn the_first_reason_is_true() {
    let models = models();
    for (file, code, line, operation, note) in [
        (
            "mamba.rs",
            "AS0219",
            "&state.prev_xs[li]",
            "`state.prev_xs` carries a tensor from each call to the next",
            RECURRENCE,
        ),
        (
            "marian.rs",
            "AS0210",
            "query_states.matmul(&key_states.transpose(1, 2)?)",
            "pairs the tokens of `xs` with those of `encoder_xs`",
            "between two sequences",
        ),
        (
            "parler_tts.rs",
            "AS0210",
            "query_states.matmul(&key_states.transpose(2, 3)?)",
            "pairs the tokens of `input_ids` with those of `encoder_xs`",
            "between two sequences",
        ),
        (
            "trocr.rs",
            "AS0210",
            "query_states.matmul(&key_states.transpose(1, 2)?)",
            "with those of `encoder_xs`",
            "between two sequences",
        ),
        (
            "debertav2.rs",
            "AS0217",
            "attention_scores.broadcast_add(&rel_att)?",
            "adds a learned bias to the scores",
            BIAS,
        ),
        (
            "metavoice.rs",
            "AS0201",
            "pub mod gpt {",
            "`mod gpt` inside of it is not looked into",
            "one module",
        ),
        (
            "mamba2.rs",
            "AS0219",
            "state.conv_states[self.layer_idx].narrow",
            "`state.conv_states` carries",
            RECURRENCE,
        ),
        (
            "rwkv_v5.rs",
            "AS0219",
            "state.per_layer[self.layer_id].extract_key_value.clone()",
            "`state.per_layer[_].extract_key_value` carries",
            RECURRENCE,
        ),
        (
            "rwkv_v6.rs",
            "AS0219",
            "for t_ in 0..t {",
            "the loop over `0..t` hands `state_` from each token to the next",
            RECURRENCE,
        ),
        (
            "rwkv_v7.rs",
            "AS0219",
            "(&state.att_x_prev - x)?",
            "`state.per_layer[_].att_x_prev` carries",
            RECURRENCE,
        ),
        (
            "recurrent_gemma.rs",
            "AS0219",
            "for t in 0..hidden_states.dim(1)? {",
            "hands `recurrent_states` from each token to the next",
            RECURRENCE,
        ),
        (
            "based.rs",
            "AS0219",
            "self.state",
            "`self.state` carries",
            RECURRENCE,
        ),
        (
            "lfm2.rs",
            "AS0218",
            "conv.forward(&bx)?",
            "`conv.forward(&bx)` slides over neighbouring tokens",
            CONVOLUTION,
        ),
        (
            "t5.rs",
            "AS0217",
            "(scores.broadcast_add(&position_bias)?, Some(position_bias))",
            "`scores.broadcast_add(&position_bias)` adds a learned bias",
            BIAS,
        ),
        (
            "blip_text.rs",
            "AS0210",
            "query.matmul(&key.t()?)?",
            "pairs the tokens of `input_ids` with those of `encoder_hidden_states`",
            "between two sequences",
        ),
        (
            "chinese_clip/text_model.rs",
            "AS0211",
            "self.dropout.forward(&attention_probs, false)?",
            "stands between the softmax and the values",
            "",
        ),
    ] {
        let text = std::fs::read_to_string(models.join(file)).expect("a model");
        let analysis = autosp_compiler::analyse(&text).expect("Rust");
        let refusal = analysis.refusals.first().expect(file);
        let said = refusal.text(Some(file));
        assert_eq!(refusal.code.id, code, "{said}");
        let found = text.lines().nth(refusal.line() - 1).unwrap_or_default();
        assert!(
            found.contains(line),
            "{file}: expected `{line}`, found `{found}`: {said}"
        );
        assert!(said.contains(operation) && said.contains(note), "{said}");
        assert!(
            refusal.help.as_ref().is_some_and(|help| help.len() > 20),
            "{said}"
        );
    }
}
