//! Lengths that reach a number by ways that no one looks at, and branches that are taken for decided: in each edit of the example what
//! a rank computes from its own part would differ from what one device computes. None may be planned.

mod common;

use common::{llama, refusals, with};

/// A rank's own length, hidden in something that is not a number.
const LENGTHS: &[(&str, &str)] = &[
    // In a struct.
    (
        "let c = Length { n: x.dim(1)? }; let x = &(x * (1.0 / c.n as f64))?;",
        "struct Length { n: usize }",
    ),
    (
        "let mut c = Length { n: 1 }; c.n = x.dim(1)?; let x = &(x * (1.0 / c.n as f64))?;",
        "struct Length { n: usize }",
    ),
    // In one of two branches.
    (
        "let n = if let Some(n) = lengths().get(\"n\") { *n } else { x.dim(1)? }; let x = &(x * (1.0 / n as f64))?;",
        "fn lengths() -> std::collections::HashMap<String, usize> { Default::default() }",
    ),
    // In what is made of all sizes.
    (
        "let mut n = 1; for d in x.dims() { n *= d; } let x = &(x * (1.0 / n as f64))?;",
        "",
    ),
    (
        "let n: usize = x.dims()[1..].iter().sum(); let x = &(x * (1.0 / n as f64))?;",
        "",
    ),
    (
        "let n = [x.dim(1)?, 7].iter().sum::<usize>(); let x = &(x * (1.0 / n as f64))?;",
        "",
    ),
    (
        "let n = *x.dims().iter().max().unwrap(); let x = &(x * (1.0 / n as f64))?;",
        "",
    ),
    (
        "let n = elsewhere::product(x.dims()); let x = &(x * (1.0 / n as f64))?;",
        "",
    ),
    (
        "let n = elsewhere::largest(&[x.dim(1)?, 7]); let x = &(x * (1.0 / n as f64))?;",
        "",
    ),
    // In a struct that is made of another.
    (
        "let a = Length { n: x.dim(1)?, m: 1 }; let b = Length { m: 2, ..a }; let x = &(x * (1.0 / b.n as f64))?;",
        "struct Length { n: usize, m: usize }",
    ),
    // By a division that leaves a rest.
    ("let x = &x.narrow(1, 0, x.dim(1)? / 2 * 2)?;", ""),
    (
        "let n = x.dim(1)? / 3; let x = &x.narrow(1, 0, n * 3)?;",
        "",
    ),
];

#[test]
fn no_length_goes_unseen() {
    let accepted: Vec<_> = LENGTHS
        .iter()
        .filter(|(before, items)| refusals(&with(before, items)).is_empty())
        .collect();
    assert!(accepted.is_empty(), "accepted: {accepted:#?}");
}

fn expanded(source: &str) -> String {
    let file = autosp_compiler::expand(source).expect("Rust");
    let file = file.unwrap_or_else(|refusals| panic!("{}", refusals[0].text(None)));
    prettyplease::unparse(&file)
}

/// How often the text stands in what is emitted beside the original.
fn in_twins(source: &str, what: &str) -> usize {
    expanded(source).matches(what).count() - source.matches(what).count()
}

#[test]
fn all_sizes_of_a_tensor_together_are_those_of_the_sequence() {
    for n in [
        "x.dims().iter().product::<usize>()",
        "x.shape().elem_count()",
        "x.elem_count()",
    ] {
        let source = with(
            &format!("let n = {n}; let x = &(x * (1.0 / n as f64))?;"),
            "",
        );
        assert!(
            expanded(&source).contains("1.0 / rt::valid(n) as f64"),
            "{n}"
        );
    }
    let source = with(
        "let n = *x.dims().last().unwrap(); let x = &(x * (1.0 / n as f64))?;",
        "",
    );
    assert!(refusals(&source).is_empty());
}

#[test]
fn a_branch_is_not_decided_by_another_evaluation_of_it() {
    // The closure's branch is decided where it is called with a number, and open where it is called with a setting.
    for branch in [
        "if n == 1 { Ok(t.clone()) } else { t * 3.25 }",
        "if n != 1 { t * 3.25 } else { Ok(t.clone()) }",
        "match n { 1 => Ok(t.clone()), _ => t * 3.25 }",
    ] {
        for calls in [
            "let y = f(x, 1)?; let z = f(&y, self.attention.num_heads)?;",
            "let y = f(x, self.attention.num_heads)?; let z = f(&y, 1)?;",
        ] {
            let closure =
                format!("let f = |t: &Tensor, n: usize| -> Result<Tensor> {{ {branch} }};");
            let source = with(&format!("{closure} {calls} let x = &z;"), "");
            assert_eq!(in_twins(&source, "3.25"), 1, "{branch} {calls}");
        }
    }
}

#[test]
fn a_pattern_with_a_rest_may_not_match() {
    for pattern in ["(1, ..)", "(.., 1)", "(_, 1, ..)"] {
        let heads = "self.attention.num_heads";
        let source = with(
            &format!(
                "let x = &match ({heads}, {heads}, {heads}) {{ {pattern} => x.clone(), _ => (x * 3.25)? }};"
            ),
            "",
        );
        assert_eq!(in_twins(&source, "3.25"), 1, "{pattern}");
    }
}

#[test]
fn what_no_round_of_a_loop_wrote_is_what_it_was() {
    let field = "post_attention_norm: RmsNorm,\n    mlp: Mlp,\n}";
    let source = with(
        "let mut found = false; for _ in self.extra.iter() { found = true; } let x = &if found { (x * 3.25)? } else { (x * 4.25)? };",
        "",
    )
    .replacen(field, "post_attention_norm: RmsNorm,\n    mlp: Mlp, extra: Vec<Linear> }", 1);
    assert_eq!(in_twins(&source, "4.25"), 1);
}

#[test]
fn two_elements_of_a_list_are_not_one() {
    let norm = "let x = self.norm.forward(&x)?;";
    let asked = "let x = if self.blocks[0].attention.num_heads == self.blocks[1].attention.num_heads { x } else { (x * 3.25)? };";
    let source = llama().replacen(norm, &format!("{norm} {asked}"), 1);
    assert_eq!(in_twins(&source, "3.25"), 1);
}

#[test]
fn a_mask_that_is_changed_after_it_was_made() {
    for change in [
        "mask.reverse();",
        "mask.rotate_left(1);",
        "mask.swap(0, 1);",
        "mask.insert(0, 0);",
        "mask.fill(0);",
        "mask.sort();",
        "mask.extend([0]);",
        "mask.truncate(1);",
    ] {
        let made = "let mask: Vec<_> = (0..t)\n                .flat_map(|i| (0..t).map(move |j| u8::from(j > i)))\n                .collect();";
        let changed = format!("{} {change}", made.replace("let mask", "let mut mask"));
        let source = common::edit(&llama(), made, &changed);
        assert!(!refusals(&source).is_empty(), "accepted: {change}");
    }
}

/// A closure that is called twice, of which the two calls need different code.
const CLOSURES: &[&str] = &[
    // A length of the sequence, and a number that a rank must not take for one.
    "let f = |n: usize| Tensor::arange(0u32, n as u32, x.device());
     let p = f(x.dim(1)?)?.to_dtype(DType::F32)?.reshape((1, x.dim(1)?, 1))?; let q = f(self.attention.num_heads)?.to_dtype(DType::F32)?.sum_all()?;
     let x = &x.broadcast_add(&p)?.broadcast_add(&q)?;",
    "let f = |n: usize| -> f64 { 1.0 / n as f64 }; let a = f(x.dim(1)?); let b = f(self.attention.num_heads); let x = &(x * (a + b))?;",
    "let f = |n: usize| -> f64 { 1.0 / n as f64 }; let b = f(4); let a = f(x.dim(1)?); let x = &(x * (a + b))?;",
    "let f = |n: usize| -> f64 { 1.0 / n as f64 }; let b = f(x.dim(0)?); let a = f(x.dim(1)?); let x = &(x * (a + b))?;",
    // A table to be cut, and a shard.
    "let f = |t: &Tensor, p: &Tensor| t.broadcast_add(p); let table = cache.cos.narrow(0, 0, x.dim(1)?)?;
     let y = f(x, &table)?; let z = f(&y, x)?; let x = &z;",
    "let f = |t: &Tensor, p: &Tensor| t.broadcast_add(p); let table = cache.cos.narrow(0, 0, x.dim(1)?)?;
     let y = f(x, x)?; let z = f(&y, &table)?; let x = &z;",
    // The same through functions.
    "let f = |n: usize| scale(n); let a = f(x.dim(1)?); let b = f(4); let x = &(x * (a + b))?;",
    "let f = |n: usize| scale(n); let b = f(4); let a = f(x.dim(1)?); let x = &(x * (a + b))?;",
];

#[test]
fn no_closure_stands_for_two_evaluations_that_differ() {
    let items = "fn scale(n: usize) -> f64 { 1.0 / n as f64 }";
    let accepted: Vec<_> = CLOSURES
        .iter()
        .filter(|before| refusals(&with(before, items)).is_empty())
        .collect();
    assert!(accepted.is_empty(), "accepted: {accepted:#?}");
    for same in [
        "let f = |n: usize| -> f64 { 1.0 / n as f64 }; let a = f(x.dim(1)?); let b = f(x.dim(1)?); let x = &(x * (a + b))?;",
        "let f = |n: usize| -> f64 { 1.0 / n as f64 }; let a = f(4); let b = f(5); let x = &(x * (a + b))?;",
        "let f = |t: &Tensor| candle_nn::ops::softmax_last_dim(t); let x = &f(&f(x)?)?;",
        "let f = |n: usize| scale(n); let b = f(x.dim(1)?); let a = f(x.dim(1)?); let x = &(x * (a + b))?;",
    ] {
        assert_eq!(refusals(&with(same, items)), Vec::<String>::new(), "{same}");
    }
}

/// Something along the tokens of an input whose sizes are read only afterwards.
#[test]
fn what_an_input_turns_out_to_be_holds_for_what_was_computed_of_it() {
    let model = |first: &str| {
        format!(
            "use candle_core::{{D, Result, Tensor}}; use candle_nn::{{LayerNorm, Linear, Module}};
             pub struct A {{ q: Linear, norm: LayerNorm, heads: usize, width: usize }}
             impl A {{ pub fn forward(&self, x: &Tensor) -> Result<Tensor> {{
                 let g = {first};
                 let (b, s, _) = x.dims3()?;
                 let q = self.q.forward(&g)?.reshape((b, s, self.heads, self.width))?.transpose(1, 2)?;
                 let w = candle_nn::ops::softmax_last_dim(&q.matmul(&q.t()?)?)?;
                 w.matmul(&q)?.transpose(1, 2)?.reshape((b, s, self.heads * self.width))
             }} }}"
        )
    };
    for first in [
        "candle_nn::ops::softmax_last_dim(&x.t()?)?.t()?",
        "self.norm.forward(&x.t()?)?.t()?",
        "self.norm.forward(&x.transpose(D::Minus1, D::Minus2)?)?.t()?",
        "self.norm.forward(&x.transpose(1, 2)?)?.transpose(1, 2)?",
        "self.q.forward(&x.transpose(1, 2)?)?.transpose(1, 2)?",
        "x.cumsum(D::Minus2)?",
        "x.cumsum(1)?",
        "candle_nn::ops::softmax(x, D::Minus2)?",
        "(x - x.max_keepdim(D::Minus2)?)?",
        "x.broadcast_sub(&x.max_keepdim(1)?)?",
        "x.flip(&[1])?",
        "(x + self.norm.forward(&x.t()?)?.t()?)?",
        "(x + self.q.forward(&x.transpose(D::Minus1, D::Minus2)?)?.t()?)?",
        "(x + x.t()?.sqr()?)?",
        "x.broadcast_mul(&x.narrow(D::Minus2, 0, 1)?)?",
        "x.permute((0, 2, 1))?.cumsum(2)?.permute((0, 2, 1))?",
    ] {
        assert!(!refusals(&model(first)).is_empty(), "accepted: {first}");
    }
    for first in [
        "self.norm.forward(x)?",
        "candle_nn::ops::softmax_last_dim(x)?",
        "self.norm.forward(&self.norm.forward(x)?)?",
        "(x + self.norm.forward(x)?)?",
    ] {
        assert_eq!(refusals(&model(first)), Vec::<String>::new(), "{first}");
    }
}

/// The model with another loop over its blocks, or more than one, and what follows.
fn looped(loops: &str) -> String {
    let source = llama();
    let from = source
        .find("        for (layer, block) in self.blocks")
        .expect("the loop");
    let to = source
        .find("        let x = self.norm.forward(&x)?;")
        .expect("its end");
    format!("{}{loops}{}", &source[..from], &source[to..])
}

#[test]
fn the_memory_of_a_blocks_input_is_kept_where_somebody_has_it() {
    let call = "block.forward(&x, index_pos, 0, cache)?";
    let plain = format!("for block in self.blocks.iter() {{ x = {call}; }}");
    for (loops, taken) in [
        (plain.clone(), 1),
        (format!("{plain} {plain}"), 2),
        (
            format!("for block in self.blocks.iter() {{ let y = {call}; x = y; }}"),
            1,
        ),
        // The input of the second loop's first block is the first loop's result.
        (
            format!("{plain} let middle = x.clone(); {plain} let x = (x + middle)?;"),
            1,
        ),
        (
            format!("{plain} let middle = x.sqr()?; {plain} let x = (x + middle)?;"),
            1,
        ),
        // Every block's result is in a sum, whose backward reads it.
        (
            format!(
                "let mut total = x.sqr()?.mean(1)?; for block in self.blocks.iter() {{ let y = {call}; total = (total + y.sqr()?.mean(1)?)?; x = y; }} let x = x.broadcast_add(&total.unsqueeze(1)?)?;"
            ),
            0,
        ),
        (
            format!(
                "let mut total = x.sqr()?.mean(1)?; for block in self.blocks.iter() {{ let h = x.clone(); let y = {}; total = (total + h.sqr()?.mean(1)?)?; x = y; }} let x = x.broadcast_add(&total.unsqueeze(1)?)?;",
                call.replace("&x", "&h")
            ),
            0,
        ),
        // Left before the result takes the place of the input.
        (
            format!(
                "for block in self.blocks.iter() {{ let y = {call}; if self.last_token_only {{ break; }} x = y; }}"
            ),
            0,
        ),
        // Round again, and looked at in between.
        (
            format!(
                "let mut total = x.sqr()?.mean(1)?; for _ in 0..2 {{ {plain} total = (total + x.sqr()?.mean(1)?)?; }} let x = x.broadcast_add(&total.unsqueeze(1)?)?;"
            ),
            0,
        ),
    ] {
        let source = looped(&loops);
        assert_eq!(refusals(&source), Vec::<String>::new(), "{loops}");
        let text = expanded(&source);
        assert_eq!(
            text.matches("rt::checkpoint_last(").count(),
            taken,
            "{loops}"
        );
    }
}

/// What a closure returns from its middle is the closure's, and a chain of calls is not its last one.
#[test]
fn a_value_comes_from_where_it_is_given() {
    let flipped = "let f = |t: &Tensor| -> Result<Tensor> { if self.attention.num_heads == 3 { return t.flip(&[1]); } Ok(t.clone()) }; let y = f(x)?; let x = &y;";
    assert!(!refusals(&with(flipped, "")).is_empty());
    // The rows and tokens of the second `flatten` are not the first one's.
    let merged = "let (b, s, h) = x.dims3()?; let y = x.reshape((b, s, 2, h / 2))?.flatten_from(2)?.flatten(0, 1)?; let x = &(x + y.reshape((s, b, h))?.transpose(0, 1)?)?;";
    assert!(!refusals(&with(merged, "")).is_empty());
    let flat = "let (b, s, h) = x.dims3()?; let y = x.unsqueeze(3)?.flatten_from(2)?.flatten(0, 1)?; let x = &(x + y.reshape((b, s, h))?)?;";
    assert_eq!(refusals(&with(flat, "")), Vec::<String>::new());
}

/// `None` and constants in patterns are no variables.
#[test]
fn a_pattern_that_is_a_value_binds_nothing() {
    let kept = "let o = self.maybe.clone(); let o: Option<Tensor> = match &o { Some(_) => Some(x.clone()), None => None }; let x = &match o { Some(o) => (x + o)?, None => x.clone() };";
    let field = "post_attention_norm: RmsNorm,\n    mlp: Mlp,\n}";
    let source = with(kept, "").replacen(
        field,
        "post_attention_norm: RmsNorm,\n    mlp: Mlp, maybe: Option<Tensor> }",
        1,
    );
    assert_eq!(refusals(&source), Vec::<String>::new());
    // The constant is 1, and the arm of 1 is not taken for 3 heads.
    let source = with(
        "let x = &match self.attention.num_heads { ONE => x.clone(), _ => (x * ONE as f64)? };",
        "const ONE: usize = 1;",
    );
    assert_eq!(in_twins(&source, "ONE as f64"), 1);
}
