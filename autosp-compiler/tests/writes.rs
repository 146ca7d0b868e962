//! Values that are written round the name of a variable, or that a name stands for otherwise than it seems. In each edit of the example
//! the tokens are turned round, or may be; none may be planned as if they were not.

mod common;

use common::{edit, llama, refusals, with};

const HOLDER: &str = "struct Holder { t: Tensor }";

/// What stands in front of a block, and at the end of the module.
const TURNED: &[(&str, &str)] = &[
    // Through a reference.
    (
        "let mut y = x.clone(); update(&mut y)?; let x = &y;",
        "fn update(x: &mut Tensor) -> Result<()> { *x = x.flip(&[1])?; Ok(()) }",
    ),
    (
        "let mut y = x.clone(); let r = &mut y; *r = r.flip(&[1])?; let x = &y;",
        "",
    ),
    (
        "let mut y = x.clone(); let mut z = x.flip(&[1])?; std::mem::swap(&mut y, &mut z); let x = &y;",
        "",
    ),
    (
        "let mut y = x.clone(); let _ = std::mem::replace(&mut y, x.flip(&[1])?); let x = &y;",
        "",
    ),
    (
        "let mut o = Some(x.clone()); if let Some(y) = o.as_mut() { *y = y.flip(&[1])?; } let x = &o.unwrap();",
        "",
    ),
    (
        "let mut o = Some(x.clone()); if let Some(ref mut y) = o { *y = y.flip(&[1])?; } let x = &o.unwrap();",
        "",
    ),
    (
        "let mut o = Some(x.clone()); let x = &turned(&mut o)?;",
        "fn turned(o: &mut Option<Tensor>) -> Result<Tensor> { if let Some(y) = o { *y = y.flip(&[1])?; } Ok(o.clone().unwrap()) }",
    ),
    (
        "let c = std::cell::RefCell::new(x.clone()); *c.borrow_mut() = x.flip(&[1])?; let y = c.borrow().clone(); let x = &y;",
        "",
    ),
    (
        "let mut n = 1; bump(&mut n); let x = &x.narrow(1, 0, n)?;",
        "fn bump(n: &mut usize) { *n += 1; }",
    ),
    // Into a place.
    (
        "let mut t = (x.clone(), 1); t.0 = x.flip(&[1])?; let x = &t.0;",
        "",
    ),
    (
        "let mut y = vec![x.clone()]; y[0] = x.flip(&[1])?; let x = &y[0];",
        "",
    ),
    (
        "let mut y = vec![x.clone()]; for z in y.iter_mut() { *z = z.flip(&[1])?; } let x = &y[0];",
        "",
    ),
    (
        "let mut y = vec![x.clone()]; if let Some(z) = y.get_mut(0) { *z = z.flip(&[1])?; } let x = &y[0];",
        "",
    ),
    (
        "let mut h = Holder { t: x.clone() }; h.t = x.flip(&[1])?; let x = &h.t;",
        HOLDER,
    ),
    (
        "let Holder { t } = Holder { t: x.flip(&[1])? }; let x = &(x + &t)?;",
        HOLDER,
    ),
    (
        "let mut y = vec![x.clone(), x.flip(&[1])?]; y.swap(0, 1); let x = &y[0];",
        "",
    ),
    (
        "let mut y = vec![x.clone(), x.flip(&[1])?]; y.reverse(); let x = &y[0];",
        "",
    ),
    (
        "let mut y = [x.clone(), x.flip(&[1])?]; y.rotate_left(1); let x = &y[0];",
        "",
    ),
    // By a pattern on the left.
    (
        "let mut y = x.clone(); let mut n = 0; (y, n) = (y.flip(&[1])?, n + 1); let x = &y;",
        "",
    ),
    (
        "let mut y = [x.clone(), x.clone()]; [y[0], _] = [x.flip(&[1])?, x.clone()]; let x = &y[0];",
        "",
    ),
    (
        "let y = [x.clone(), x.flip(&[1])?, x.clone()]; let [_, rest @ ..] = &y; let x = &(x + &rest[0])?;",
        "",
    ),
    // By a closure.
    (
        "let mut y = x.clone(); let mut f = |t: &Tensor| -> Result<()> { y = t.flip(&[1])?; Ok(()) }; f(x)?; let x = &y;",
        "",
    ),
    (
        "let y = (0..1).fold(x.clone(), |a, _| a.flip(&[1]).unwrap()); let x = &y;",
        "",
    ),
    // Left from the middle.
    (
        "let y = 'a: { if x.rank() == 3 { break 'a x.flip(&[1])?; } x.clone() }; let x = &y;",
        "",
    ),
    (
        "let mut y = x.clone(); for l in [1, 2].iter() { y = y.transpose(0, 1)?; if self.attn.num_heads == *l { break; } y = y.transpose(0, 1)?; } let x = &y;",
        "",
    ),
    // By another function of the same name.
    (
        "fn turned(x: &Tensor) -> Result<Tensor> { x.flip(&[1]) } let x = &turned(x)?;",
        "fn turned(x: &Tensor) -> Result<Tensor> { Ok(x.clone()) }",
    ),
    (
        "let x = &Two.forward(x)?;",
        "struct Two; impl candle_nn::Module for Two { fn forward(&self, x: &Tensor) -> Result<Tensor> { Ok(x.clone()) } } impl Two { fn forward(&self, x: &Tensor) -> Result<Tensor> { x.flip(&[1]) } }",
    ),
    (
        "let two = Two; let x = &x.apply(&two)?;",
        "struct Two; impl Two { fn forward(&self, x: &Tensor) -> Result<Tensor> { Ok(x.clone()) } } impl candle_nn::Module for Two { fn forward(&self, x: &Tensor) -> Result<Tensor> { x.flip(&[1]) } }",
    ),
    (
        "let y = vec![x.flip(&[1])?]; let i = usize::from_str_radix(\"0\", 10).unwrap(); let x = &(x + &y[i])?;",
        "",
    ),
    // Along the sequence, whichever argument says so.
    ("let x = &x.flip(&[1])?;", ""),
    ("let x = &x.flip(&[2, 1])?;", ""),
    ("let x = &x.roll(2, 1)?;", ""),
    ("let x = &x.roll(-1, 1)?;", ""),
];

#[test]
fn no_write_goes_unseen() {
    for (before, items) in TURNED {
        let refused = !refusals(&with(before, items)).is_empty();
        assert!(refused, "accepted: {before} {items}");
    }
}

#[test]
fn what_means_the_same_is_planned() {
    for (before, items) in [
        (
            "let mut y = x.clone(); let mut n = 0; (y, n) = (y.contiguous()?, n + 1); let x = &y;",
            "",
        ),
        ("let x = &x.flip(&[2])?;", ""),
        ("let x = &x.roll(1, 2)?;", ""),
        ("let y = { let x = x.clone(); x }; let x = &y;", ""),
        (
            "let mut y = x.clone(); for _ in 0..2 { y = (y * 1.5)?; } let x = &y;",
            "",
        ),
        ("const HALF: f64 = 0.5; let x = &(x * HALF)?;", ""),
        (
            "let y = &mut x.clone(); *y = (&*y * 2.0)?; let x = &*y;",
            "",
        ),
    ] {
        let found = refusals(&with(before, items));
        assert!(found.is_empty(), "{before} {items}: {found:?}");
    }
    // A method that stands before an inherent one of the same name is another one.
    let same = edit(
        &llama(),
        "pub struct Llama",
        "struct Two;\nimpl Two {\n    fn twice(&self) -> usize {\n        2\n    }\n}\n\npub struct Llama",
    );
    assert!(refusals(&same).is_empty());
}
