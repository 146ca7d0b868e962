use autosp_plan::Settings;
use proptest::prelude::*;

use super::*;
use crate::run_with;

fn tokens(rows: usize, s: usize) -> Tensor {
    Tensor::arange(1u32, (rows * s) as u32 + 1, &Device::Cpu)
        .unwrap()
        .reshape((rows, s))
        .unwrap()
}

type Parts = Vec<(Vec<Vec<u32>>, Vec<Vec<i64>>, Shard)>;

fn parts(dp: usize, sp: usize, cut: impl Fn(&Sp) -> Result<Batch> + Sync) -> Result<Parts> {
    run_with(Settings::default().with_dp(dp).with_sp(sp), |sp| {
        let batch = cut(sp)?;
        assert_eq!(sp.shard_of(batch.tokens.id()), Some(batch.shard));
        Ok((
            batch.tokens.to_vec2()?,
            batch.labels.to_vec2()?,
            batch.shard,
        ))
    })
}

/// The shards of a mesh put together again: tokens and labels of the padded sequences.
fn join(parts: &Parts, dp: usize, sp: usize) -> (Vec<Vec<u32>>, Vec<Vec<i64>>) {
    let (mut tokens, mut labels) = (Vec::new(), Vec::new());
    for replica in 0..dp {
        let ranks = &parts[replica * sp..(replica + 1) * sp];
        for row in 0..ranks[0].0.len() {
            tokens.push(ranks.iter().flat_map(|rank| rank.0[row].clone()).collect());
            labels.push(ranks.iter().flat_map(|rank| rank.1[row].clone()).collect());
        }
    }
    (tokens, labels)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// All shards together are exactly the shifted labels, with padding behind them and nowhere else.
    #[test]
    fn shards_join_to_the_shifted_sequence(dp in 1usize..4, sp in 1usize..5, rows in 1usize..3, s in 1usize..23, kept in any::<u32>()) {
        let rows = rows * dp;
        let global = tokens(rows, s);
        let whole = global.to_vec2::<u32>().unwrap();
        let labels: Vec<Vec<i64>> = whole.iter().map(|row| {
            row.iter().enumerate().map(|(i, &t)| if kept >> (i % 32) & 1 == 1 { i64::from(t) } else { IGNORE }).collect()
        }).collect();
        let aligned = Tensor::new(labels.clone(), &Device::Cpu).unwrap();
        let shifted = |rows: &[Vec<i64>]| rows.iter().map(|row| [&row[1..], &[IGNORE]].concat()).collect::<Vec<_>>();
        let all: Vec<Vec<i64>> = whole.iter().map(|row| row.iter().map(|&t| i64::from(t)).collect()).collect();
        let found = [
            (parts(dp, sp, |sp| sp.shard(&global)).unwrap(), shifted(&all)),
            (parts(dp, sp, |sp| sp.shard_labelled(&global, &aligned)).unwrap(), shifted(&labels)),
            (parts(dp, sp, |sp| sp.shard_targets(&global, &aligned)).unwrap(), labels.clone()),
        ];
        for (parts, expected) in found {
            let (tokens, labels) = join(&parts, dp, sp);
            for (((tokens, labels), whole), expected) in tokens.iter().zip(&labels).zip(&whole).zip(&expected) {
                prop_assert_eq!(&tokens[..s], &whole[..]);
                prop_assert_eq!(&labels[..s], &expected[..]);
                prop_assert!(tokens[s..].iter().all(|&t| t == 0) && labels[s..].iter().all(|&l| l == IGNORE));
                prop_assert!(tokens.len() < s + sp && tokens.len() % sp == 0);
            }
            for (rank, (_, _, shard)) in parts.iter().enumerate() {
                prop_assert_eq!(*shard, Shard::new(s, rank % sp, sp));
            }
        }
    }
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let refused =
        |dp, sp, tokens: Tensor| parts(dp, sp, |sp| sp.shard(&tokens)).unwrap_err().code();
    assert_eq!(refused(2, 1, tokens(3, 4)), codes::BATCH_SPLIT);
    assert_eq!(
        refused(1, 2, tokens(3, 4).to_dtype(DType::F32).unwrap()),
        codes::BATCH_SHAPE
    );
    assert_eq!(
        refused(1, 2, tokens(3, 4).flatten_all().unwrap()),
        codes::BATCH_SHAPE
    );
    let labels = tokens(2, 3);
    let error = parts(1, 1, |sp| sp.shard_labelled(&tokens(2, 4), &labels)).unwrap_err();
    assert_eq!(error.code(), codes::BATCH_SHAPE);
}

#[test]
fn ranks_of_one_sequence_with_other_tokens_are_found_out() {
    let error = parts(1, 2, |sp| sp.shard(&(tokens(1, 4) + sp.rank() as f64)?)).unwrap_err();
    assert_eq!(error.code(), codes::RANKS_DISAGREE);
    parts(2, 1, |sp| sp.shard(&(tokens(2, 4) + sp.rank() as f64)?)).unwrap();
    let error = parts(1, 2, |sp| sp.shard(&tokens(1, 4 + sp.rank()))).unwrap_err();
    assert_eq!(error.code(), codes::RANKS_DISAGREE);
}
