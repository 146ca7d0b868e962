//! Rows beside the rule: tensors from nothing, reads to the host, windows and scans.

use super::*;

/// An operation without operands.
type Make<'d> = Box<dyn Fn() -> Result<Tensor> + 'd>;

#[test]
fn tensors_from_nothing_are_the_same_on_every_rank_and_have_the_shape_of_their_row() -> Result<()> {
    let d = &Device::Cpu;
    let made: Vec<(&str, ShapeRule, Vec<usize>, Make)> = vec![
        (
            "new",
            ShapeRule::Scalar,
            vec![],
            Box::new(|| Tensor::new(2.5f32, d)),
        ),
        (
            "try_from",
            ShapeRule::Scalar,
            vec![],
            Box::new(|| Tensor::try_from(2.5f32)),
        ),
        (
            "zeros",
            ShapeRule::Filled,
            vec![2, 3],
            Box::new(|| Tensor::zeros((2, 3), DType::F32, d)),
        ),
        (
            "ones",
            ShapeRule::Filled,
            vec![2, 3],
            Box::new(|| Tensor::ones((2, 3), DType::F32, d)),
        ),
        (
            "full",
            ShapeRule::FilledWith,
            vec![2, 3],
            Box::new(|| Tensor::full(2.5f32, (2, 3), d)),
        ),
        (
            "tril2",
            ShapeRule::Square,
            vec![3, 3],
            Box::new(|| Tensor::tril2(3, DType::U8, d)),
        ),
        (
            "triu2",
            ShapeRule::Square,
            vec![3, 3],
            Box::new(|| Tensor::triu2(3, DType::U8, d)),
        ),
        (
            "eye",
            ShapeRule::Square,
            vec![3, 3],
            Box::new(|| Tensor::eye(3, DType::F32, d)),
        ),
        (
            "from_slice",
            ShapeRule::FromHost,
            vec![2, 2],
            Box::new(|| Tensor::from_slice(&[1u8, 2, 3, 4], (2, 2), d)),
        ),
        (
            "from_vec",
            ShapeRule::FromHost,
            vec![2, 2],
            Box::new(|| Tensor::from_vec(vec![1u8, 2, 3, 4], (2, 2), d)),
        ),
        (
            "arange",
            ShapeRule::Arange,
            vec![5],
            Box::new(|| Tensor::arange(2u32, 7, d)),
        ),
    ];
    let rows: Vec<&Row> = candle()
        .rows()
        .iter()
        .filter(|r| r.place == PlaceRule::Make)
        .collect();
    assert_eq!(rows.len(), made.len());
    for (name, shape, dims, make) in made {
        let row = rows.iter().find(|r| r.name() == name).expect("a row");
        assert_eq!(row.shape, shape, "{name}");
        let (a, b) = (make()?, make()?);
        assert_eq!(a.dims(), dims, "{name}");
        assert_eq!(bits(&a)?, bits(&b)?, "{name}");
    }
    Ok(())
}

#[test]
fn reads_to_the_host_see_this_rank_only() -> Result<()> {
    let x = random(1, &[N]);
    let shard = x.narrow(0, 0, N / 2)?;
    assert_ne!(x.to_vec1::<f32>()?.len(), shard.to_vec1::<f32>()?.len());
    let names: Vec<&str> = candle()
        .rows()
        .iter()
        .filter(|r| r.place == PlaceRule::Host)
        .map(Row::name)
        .collect();
    assert_eq!(
        names,
        ["to_vec0", "to_vec1", "to_vec2", "to_vec3", "to_scalar"]
    );
    assert_eq!(
        x.i(0)?.to_vec0::<f32>()?.to_bits(),
        x.i(0)?.to_scalar::<f32>()?.to_bits()
    );
    assert_eq!(x.reshape((2, 3))?.to_vec2::<f32>()?.len(), 2);
    assert_eq!(x.reshape((1, 2, 3))?.to_vec3::<f32>()?.len(), 1);
    Ok(())
}

#[test]
fn windows_and_scans_need_tokens_of_other_ranks() -> Result<()> {
    let x = random(7, &[1, 2, N]);
    let kernel = random(8, &[2, 2, 3]);
    let whole = x.conv1d(&kernel, 1, 1, 1, 1)?;
    let shard = x.narrow(2, 0, N / 2)?.conv1d(&kernel, 1, 1, 1, 1)?;
    assert_ne!(bits(&whole.narrow(2, 0, N / 2)?)?, bits(&shard)?);
    let names = |rule: PlaceRule| {
        let rows = candle().rows().iter().filter(move |r| r.place == rule);
        rows.map(|r| r.path.as_str()).collect::<Vec<_>>()
    };
    assert!(names(PlaceRule::Window).contains(&"candle_nn::Conv1d::forward"));
    assert!(names(PlaceRule::Scan).contains(&"candle_nn::rnn::LSTM::seq"));
    Ok(())
}
