//! Loops that do the same with each row of the batch, lists that a loop fills, and folds.

mod common;

use common::{llama, with};

fn refusals(before: &str) -> Vec<String> {
    common::refusals(&with(before, ""))
}

#[test]
fn rows_of_the_batch_one_after_another_are_planned() {
    for rows in [
        "let (b, _s, _h) = x.dims3()?; let mut rows = Vec::new(); for i in 0..b { rows.push((x.i((i, .., ..))? * 2.0)?); } let x = &Tensor::stack(&rows, 0)?;",
        "let (b, _s, _h) = x.dims3()?; let mut rows = vec![]; for i in 0..b { rows.push(x.narrow(0, i, 1)?); } let x = &Tensor::cat(&rows, 0)?;",
        "let mut rows: Vec<Tensor> = Vec::with_capacity(2); for i in 0..x.dim(0)? { let row = x.get(i)?; let row = (&row * 2.0)?; rows.push(row.unsqueeze(0)?); } let x = &Tensor::cat(rows.as_slice(), 0)?;",
        // Nothing of the rows: a list that a loop fills.
        "let mut all = vec![]; for i in 0..3 { all.push((x * i as f64)?); } let x = &(x + &all[1])?;",
        "let mut all = vec![]; for i in 0..3 { all.push((x * i as f64)?); } let mut y = x.clone(); for z in all.iter() { y = (y + z)?; } let x = &y;",
    ] {
        assert_eq!(refusals(rows), Vec::<String>::new(), "{rows}");
    }
}

#[test]
fn rows_that_meet_each_other_or_are_tokens_are_refused() {
    let rows = "let (b, s, _h) = x.dims3()?;";
    for refused in [
        // Tokens.
        "let mut rows = vec![]; for i in 0..s { rows.push(x.i((.., i, ..))?); } let x = &Tensor::stack(&rows, 1)?;",
        "let mut rows = vec![]; for i in 0..s { rows.push(x.narrow(1, i, 1)?); } let x = &Tensor::cat(&rows, 1)?;",
        "let mut rows = vec![]; for i in 0..b { rows.push(x.i((i, i, ..))?); } let x = &x.broadcast_add(&Tensor::stack(&rows, 0)?.unsqueeze(1)?)?;",
        // Not all of them, or others.
        "let mut rows = vec![]; for i in 1..b { rows.push(x.get(i)?); } let x = &Tensor::stack(&rows, 0)?;",
        "let mut rows = vec![]; for i in 0..b { rows.push(x.get(b - 1 - i)?); } let x = &Tensor::stack(&rows, 0)?;",
        "let mut rows = vec![]; for i in 0..b { rows.push(x.get(0)?); } let x = &Tensor::stack(&rows, 0)?;",
        "let mut rows = vec![]; for i in 0..s { rows.push(x.get(i)?); } let x = &Tensor::stack(&rows, 0)?;",
        "let mut rows = vec![]; for i in 0..b { if i > 0 { rows.push(x.get(i)?); } } let x = &Tensor::stack(&rows, 0)?;",
        "let mut rows = vec![]; for i in 0..b { if i == 3 { continue; } rows.push(x.get(i)?); } let x = &Tensor::stack(&rows, 0)?;",
        "let mut rows = vec![]; for i in 0..b { rows.push(x.get(i)?); rows.push(x.get(i)?); } let x = &Tensor::stack(&rows, 0)?;",
        "let mut rows = vec![]; for i in 0..b { rows.push(x.get(i)?); } rows.reverse(); let x = &Tensor::stack(&rows, 0)?;",
        "let mut rows = vec![]; for i in 0..b { rows.push(x.get(i)?); } let x = &rows[0].unsqueeze(0)?;",
        "let mut rows = vec![]; for i in 0..b { rows.push(x.get(i)?); rows.swap(0, i); } let x = &Tensor::stack(&rows, 0)?;",
        // One with another.
        "let mut sum = x.zeros_like()?; for i in 0..b { sum = sum.broadcast_add(&x.get(i)?)?; } let x = &sum;",
        "let mut sum = x.zeros_like()?; let mut rows = vec![]; for i in 0..b { sum = sum.broadcast_add(&x.get(i)?)?; rows.push(sum.narrow(0, 0, 1)?); } let x = &Tensor::cat(&rows, 0)?;",
        "let mut last = x.clone(); for i in 0..b { last = x.narrow(0, i, 1)?; } let x = &x.broadcast_add(&last)?;",
        "let mut last = None; for i in 0..b { last = Some(x.narrow(0, i, 1)?); } let x = &x.broadcast_add(&last.unwrap())?;",
        "let mut rows = vec![]; for i in 0..b { rows.push(x.get(i)?); } let mut sum = x.zeros_like()?; for row in rows.iter() { sum = sum.broadcast_add(row)?; } let x = &sum;",
        // Behind each other along the tokens.
        "let mut rows = vec![]; for i in 0..b { rows.push(x.narrow(0, i, 1)?); } let x = &(x + Tensor::cat(&rows, 1)?.mean_keepdim(1)?.broadcast_as(x.shape())?)?;",
    ] {
        let before = format!("{rows} {refused}");
        assert!(!refusals(&before).is_empty(), "accepted: {refused}");
    }
}

#[test]
fn a_fold_over_blocks_is_a_loop_over_them() {
    let from = "        for (layer, block) in self.blocks.iter().enumerate() {\n            x = block.forward(&x, index_pos, layer, cache)?;\n        }\n";
    let fold = "let x = self.blocks.iter().enumerate().try_fold(x, |x, (layer, block)| block.forward(&x, index_pos, layer, cache))?;";
    let source = common::edit(&llama(), from, fold);
    let analysis = autosp_compiler::analyse(&source).expect("Rust");
    assert!(analysis.refusals.is_empty());
    assert!(analysis.plan.blocks[0].scope.is_some());
    // What is not seen into and may come to the attention is refused, where a user calls it.
    let hidden = fold.replace("try_fold(x, |x,", "elsewhere(x, |x: Tensor,");
    let source = common::edit(&llama(), from, &hidden);
    let analysis = autosp_compiler::analyse(&source).expect("Rust");
    assert_eq!(analysis.refusals[0].code.id, "AS0202");
    assert!(analysis.refusals[0].message.contains("elsewhere("));
    // A fold that turns the tokens round.
    for turned in ["x.flip(&[1])", "x.transpose(0, 1)", "x.cumsum(1)"] {
        let before = format!("let y = (0..2).try_fold(x.clone(), |x, _| {turned})?; let x = &y;");
        assert!(!refusals(&before).is_empty(), "{turned}");
    }
    assert!(
        refusals("let y = (0..2).try_fold(x.clone(), |x, _| &x * 2.0)?; let x = &y;").is_empty()
    );
}
