//! Documents that share a row: with attention that is told of them, each has the numbers it has alone.

use std::sync::Arc;

use autosp::{Parameters, Settings, TextReader, loss::cross_entropy};
use candle_core::{DType, Device, Tensor};

use crate::documents::{Config, Model};

/// Loss, and the gradients by name, of labelled tokens whose rows are told their documents.
fn gradients(
    sp: usize,
    tokens: &Tensor,
    labels: &Tensor,
    documents: &Arc<[u32]>,
) -> (f64, Vec<(String, Vec<f32>)>) {
    let config = Config {
        vocab: 40,
        hidden: 24,
        layers: 2,
        heads: 4,
        width: 6,
    };
    let mut ranks = autosp::run_with(Settings::default().with_sp(sp), |sp| {
        let parameters = Parameters::init(3, DType::F32, sp.device());
        let model = Model::load(parameters.builder(), &config)?;
        let batch = sp.shard_labelled(tokens, labels)?;
        let (loss, mut store) = sp.scope(|| -> autosp::Result<_> {
            let logits = model.forward(&batch.tokens, documents.clone())?;
            let loss = cross_entropy(&logits, &batch.labels)?;
            Ok((f64::from(loss.to_scalar::<f32>()?), loss.backward()?))
        })?;
        sp.reduce_gradients(&mut store, &parameters.vars())?;
        let named = parameters.named().into_iter();
        let gradients = named
            .map(|(name, var)| Ok((name, store.get(&var).unwrap().flatten_all()?.to_vec1()?)))
            .collect::<autosp::Result<_>>()?;
        Ok((loss, gradients))
    })
    .unwrap();
    ranks.swap_remove(0)
}

/// The 2-norm of a difference, and of the second.
fn apart(a: &[f32], b: &[f32]) -> (f64, f64) {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let (a, b) = (
        a.iter().map(|&x| f64::from(x)),
        b.iter().map(|&x| f64::from(x)),
    );
    (
        norm(&mut a.zip(b.clone()).map(|(a, b)| a - b)),
        norm(&mut b.into_iter()),
    )
}

#[test]
fn packed_documents_have_the_numbers_that_they_have_alone() {
    // Three documents, and rows of 33 tokens, which neither 2 nor 4 ranks divide.
    let lengths = [40u32, 9, 6];
    let documents: Vec<Vec<u32>> = lengths
        .iter()
        .map(|&n| (0..n).map(|i| 1 + (i * i + 7 * n + i) % 39).collect())
        .collect();
    let text = TextReader::new().documents(&documents).unwrap();
    // The first row that holds several documents.
    let packed = (0..20)
        .map(|step| text.packed_batch(5, step, 1, 33).unwrap())
        .find(|batch| batch.documents[0].iter().max() > Some(&1))
        .unwrap();
    let ids: Arc<[u32]> = packed.documents[0].clone().into();
    let tokens = packed
        .tokens
        .flatten_all()
        .unwrap()
        .to_vec1::<u32>()
        .unwrap();
    let labels = packed
        .labels
        .flatten_all()
        .unwrap()
        .to_vec1::<i64>()
        .unwrap();

    // The same pieces, one a row; what is behind them is ignored, and comes too late to be seen.
    let pieces = *ids.iter().max().unwrap() as usize + 1;
    let mut rows = vec![(vec![0u32; 33], vec![-100i64; 33]); pieces];
    let mut filled = vec![0; pieces];
    for (i, &id) in ids.iter().enumerate() {
        let (row, place) = (&mut rows[id as usize], filled[id as usize]);
        (row.0[place], row.1[place]) = (tokens[i], labels[i]);
        filled[id as usize] += 1;
    }
    let alone = (
        Tensor::from_vec(
            rows.iter()
                .flat_map(|row| row.0.clone())
                .collect::<Vec<_>>(),
            (pieces, 33),
            &Device::Cpu,
        )
        .unwrap(),
        Tensor::from_vec(
            rows.iter()
                .flat_map(|row| row.1.clone())
                .collect::<Vec<_>>(),
            (pieces, 33),
            &Device::Cpu,
        )
        .unwrap(),
    );
    let whole: Arc<[u32]> = vec![0; 33].into();
    let (loss, expected) = gradients(1, &alone.0, &alone.1, &whole);
    let all = expected.iter().map(|(_, x)| apart(x, x).1.powi(2));
    let floor = 1e-7 * all.sum::<f64>().sqrt();
    for sp in [1, 2, 4] {
        let (found, gradients) = gradients(sp, &packed.tokens, &packed.labels, &ids);
        assert!(
            (found - loss).abs() <= 1e-5 * loss,
            "sp {sp}: {found}, {loss}"
        );
        for ((name, a), (_, b)) in gradients.iter().zip(&expected) {
            let (difference, norm) = apart(a, b);
            assert!(
                difference <= 1e-5 * norm + floor,
                "sp {sp}: {name}: {difference} of {norm}"
            );
        }
    }
    // Attention that is told nothing crosses, and that is another loss.
    let (crossing, _) = gradients(2, &packed.tokens, &packed.labels, &whole);
    assert!((crossing - loss).abs() > 1e-4 * loss, "{crossing}, {loss}");
}
