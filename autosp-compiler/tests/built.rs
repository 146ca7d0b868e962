//! Models of families that no other test has: masks that are built of tensors, and norms that come before anything reads how many
//! dimensions the tokens have. Edits that mean something else are refused, or keep the edit in the code that runs.

mod common;

use common::edit;

const OPT: &str = include_str!("models/opt.rs");
const BLOOM: &str = include_str!("models/bloom.rs");
const COHERE: &str = include_str!("models/cohere.rs");
const DBRX: &str = include_str!("models/dbrx.rs");

fn refusals(source: &str) -> Vec<String> {
    let analysis = autosp_compiler::analyse(source).expect("Rust");
    analysis.refusals.iter().map(|r| r.text(None)).collect()
}

/// What the attribute makes of the model.
fn expansion(source: &str) -> String {
    let module: proc_macro2::TokenStream = format!("mod m {{ {source} }}").parse().expect("tokens");
    let made = autosp_compiler::sequence_parallel(proc_macro2::TokenStream::new(), &module, None);
    let text = made.to_string();
    text.split_whitespace().collect()
}

#[test]
fn masks_that_are_built_of_tensors_are_whole_on_every_rank() {
    for source in [OPT, BLOOM, COHERE] {
        assert_eq!(refusals(source), Vec::<String>::new());
    }
    let opt = expansion(OPT);
    assert!(opt.contains("tril2(rt::valid(s),"), "{opt}");
    assert!(opt.contains("Tensor::full(f32::MIN,(rt::valid(s),rt::valid(s)),"));
    assert!(opt.contains("broadcast_add(&rt::mask(&mask)?)"));
}

#[test]
fn a_table_of_numbers_alike_is_as_long_as_what_it_meets() {
    let shard = edit(
        OPT,
        "let tril =",
        "x = x.broadcast_mul(&Tensor::full(2f32, (b, s, 1), ids.device())?)?; let tril =",
    );
    assert_eq!(refusals(&shard), Vec::<String>::new());
    assert!(expansion(&shard).contains("Tensor::full(2f32,(b,s,1),"));
}

#[test]
fn lengths_in_what_fills_a_tensor_are_seen() {
    let whole = edit(OPT, "Tensor::full(f32::MIN,", "Tensor::full(-(s as f32),");
    assert!(expansion(&whole).contains("Tensor::full(-(rt::valid(s)asf32),"));
    for hidden in ["elsewhere::f(s)", "elsewhere::f(x.dims())"] {
        let source = edit(
            OPT,
            "Tensor::full(f32::MIN,",
            &format!("Tensor::full({hidden},"),
        );
        assert_eq!(refusals(&source).len(), 1, "{hidden}");
    }
}

#[test]
fn what_pairs_tokens_outside_of_an_attention_is_refused() {
    let summed = edit(
        OPT,
        "let tril =",
        "x = Tensor::tril2(s, DType::F32, ids.device())?.broadcast_matmul(&x)?; let tril =",
    );
    assert!(
        refusals(&summed)[0].contains("AS0203"),
        "{:?}",
        refusals(&summed)
    );
    let rows = edit(
        OPT,
        "candle_nn::ops::softmax_last_dim(&w)?",
        "candle_nn::ops::softmax(&w, 1)?",
    );
    assert!(refusals(&rows)[0].contains("AS0204"));
}

#[test]
fn edits_stay_in_the_code_that_runs() {
    let tokens = edit(
        COHERE,
        "let mean = x.mean_keepdim(D::Minus1)?",
        "let mean = x.mean_keepdim(1)?",
    );
    assert_eq!(refusals(&tokens), Vec::<String>::new());
    assert!(expansion(&tokens).contains("rt::sequence::mean_keepdim(&x,1)"));
    assert!(!expansion(COHERE).contains("rt::sequence::"));
    let flipped = edit(OPT, "let mask = tril", "let mask = tril.flip(&[1])?");
    assert!(expansion(&flipped).contains("tril.flip(&[1])?.where_cond("));
}

#[test]
fn what_is_said_can_be_done() {
    let said = refusals(&edit(
        COHERE,
        "blocks: Vec<Block>",
        "blocks: Vec<Box<dyn Module>>",
    ));
    assert!(
        said[0].contains("name the type that has `forward`"),
        "{said:?}"
    );
    let said = refusals(DBRX);
    assert!(
        said[0].contains("`v`, which a loop fills number by number"),
        "{said:?}"
    );
    let done = edit(
        DBRX,
        "let mut v = vec![0f32; s * s];",
        "let v: Vec<_> = (0..s).flat_map(|i| (0..s).map(move |j| if j > i { f32::NEG_INFINITY } else { 0. })).collect();",
    );
    let done = edit(
        &done,
        "for i in 0..s { for j in (i + 1)..s { v[i * s + j] = f32::NEG_INFINITY; } }",
        "",
    );
    let said = refusals(&done);
    assert!(
        said[0].contains("in the place of `dyn` or of a type parameter"),
        "{said:?}"
    );
    let done = done
        .replace("<N: Module + Clone>", "")
        .replace("Attn<N>", "Attn")
        .replace("Attn<LayerNorm>", "Attn")
        .replace("norm: N,", "norm: LayerNorm,");
    assert_eq!(refusals(&done), Vec::<String>::new());
}
