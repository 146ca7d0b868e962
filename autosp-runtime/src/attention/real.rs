//! The numbers the kernels compute with, and the element types they read and write.
//!
//! [`Real`] is `f32` or `f64`: what is accumulated. [`Element`] is what a tensor stores: `bf16` and `f16` are read into `f32`
//! and rounded once when a result is written.

use candle_core::WithDType;
use half::{bf16, f16};
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

/// A floating point type that the kernels compute in.
///
/// The flag `FMA` says that the surrounding code was compiled for a processor with fused multiply-add; without it
/// `f32::mul_add` would be a library call.
pub(crate) trait Real:
    Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + 'static
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
    + WithDType
{
    const ZERO: Self;
    const ONE: Self;
    const NAN: Self;
    const NEG_INFINITY: Self;
    /// `exp(x)` is exactly zero for every `x` below this.
    const EXP_UNDERFLOW: f64;

    fn from_double(x: f64) -> Self;
    fn double(self) -> f64;
    /// `self * a + b`.
    fn fused<const FMA: bool>(self, a: Self, b: Self) -> Self;
    /// The exponential; exact zero below [`Self::EXP_UNDERFLOW`], NaN for NaN.
    fn fast_exp<const FMA: bool>(self) -> Self;
    fn fast_tanh<const FMA: bool>(self) -> Self;
    fn log(self) -> Self;

    /// The larger one; `self` when `other` is NaN.
    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if other > self { other } else { self }
    }
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NAN: Self = f32::NAN;
    const NEG_INFINITY: Self = f32::NEG_INFINITY;
    const EXP_UNDERFLOW: f64 = -104.0;

    #[inline(always)]
    fn from_double(x: f64) -> Self {
        x as f32
    }

    #[inline(always)]
    fn double(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn fused<const FMA: bool>(self, a: Self, b: Self) -> Self {
        if FMA {
            self.mul_add(a, b)
        } else {
            self * a + b
        }
    }

    /// Cody-Waite reduction and a polynomial of degree 6 (coefficients of Cephes `expf`), within 2 units in the last place.
    /// Branch-free, so that loops over it become vector code; the scale is applied in two halves to reach subnormal results.
    #[inline(always)]
    fn fast_exp<const FMA: bool>(self) -> Self {
        const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
        const LN2_HI: f32 = 0.693_359_4;
        const LN2_LO: f32 = -2.121_944_4e-4;
        let x = if self < -104.0 { -104.0 } else { self };
        let x = if x > 89.0 { 89.0 } else { x };
        let shifted = x.fused::<FMA>(std::f32::consts::LOG2_E, SHIFT);
        let n = shifted - SHIFT;
        let r = (-n).fused::<FMA>(LN2_HI, x);
        let r = (-n).fused::<FMA>(LN2_LO, r);
        let p = 1.987_569_1e-4_f32;
        let p = p.fused::<FMA>(r, 1.398_199_9e-3);
        let p = p.fused::<FMA>(r, 8.333_452e-3);
        let p = p.fused::<FMA>(r, 4.166_579_6e-2);
        let p = p.fused::<FMA>(r, 1.666_666_5e-1);
        let p = p.fused::<FMA>(r, 0.5);
        let p = p.fused::<FMA>(r * r, r) + 1.0;
        let bits = shifted.to_bits().wrapping_sub(SHIFT.to_bits()) as i32;
        let half = bits >> 1;
        // Wrapping, since a check for overflow is a branch.
        let rest = bits.wrapping_sub(half);
        let power = |e: i32| f32::from_bits((e.wrapping_add(127) as u32).wrapping_shl(23));
        p * power(half) * power(rest)
    }

    /// Rational approximation on [-9, 9] (the minimax form used by Eigen), saturated outside; relative error about 3e-7,
    /// also near zero.
    #[inline(always)]
    fn fast_tanh<const FMA: bool>(self) -> Self {
        let x = if self > 9.0 { 9.0 } else { self };
        let x = if x < -9.0 { -9.0 } else { x };
        let x2 = x * x;
        let p = -2.760_768_5e-16_f32;
        let p = p.fused::<FMA>(x2, 2.000_188e-13);
        let p = p.fused::<FMA>(x2, -8.604_672e-11);
        let p = p.fused::<FMA>(x2, 5.122_297e-8);
        let p = p.fused::<FMA>(x2, 1.485_722_4e-5);
        let p = p.fused::<FMA>(x2, 6.372_619_5e-4);
        let p = p.fused::<FMA>(x2, 4.893_525e-3);
        let q = 1.198_258_4e-6_f32;
        let q = q.fused::<FMA>(x2, 1.185_347_1e-4);
        let q = q.fused::<FMA>(x2, 2.268_434_6e-3);
        let q = q.fused::<FMA>(x2, 4.893_525e-3);
        x * p / q
    }

    #[inline(always)]
    fn log(self) -> Self {
        self.ln()
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NAN: Self = f64::NAN;
    const NEG_INFINITY: Self = f64::NEG_INFINITY;
    const EXP_UNDERFLOW: f64 = -746.0;

    #[inline(always)]
    fn from_double(x: f64) -> Self {
        x
    }

    #[inline(always)]
    fn double(self) -> f64 {
        self
    }

    #[inline(always)]
    fn fused<const FMA: bool>(self, a: Self, b: Self) -> Self {
        if FMA {
            self.mul_add(a, b)
        } else {
            self * a + b
        }
    }

    #[inline(always)]
    fn fast_exp<const FMA: bool>(self) -> Self {
        self.exp()
    }

    #[inline(always)]
    fn fast_tanh<const FMA: bool>(self) -> Self {
        self.tanh()
    }

    #[inline(always)]
    fn log(self) -> Self {
        self.ln()
    }
}

/// A type that tensors store and the kernels can read and write.
pub(crate) trait Element: WithDType {
    /// What it is computed in.
    type Acc: Real;
    fn up(self) -> Self::Acc;
    fn down(x: Self::Acc) -> Self;
}

macro_rules! element {
    ($($t:ty, $acc:ty, $up:expr, $down:expr;)*) => { $(
        impl Element for $t {
            type Acc = $acc;
            #[inline(always)]
            fn up(self) -> $acc { $up(self) }
            #[inline(always)]
            fn down(x: $acc) -> Self { $down(x) }
        }
    )* };
}

element! {
    f32, f32, |x| x, |x| x;
    f64, f64, |x| x, |x| x;
    bf16, f32, bf16::to_f32, bf16::from_f32;
    f16, f32, f16::to_f32, f16::from_f32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut x = -110.0_f32;
        while x < 80.0 {
            let want = f64::from(x).exp();
            for got in [x.fast_exp::<true>(), x.fast_exp::<false>()] {
                let unit = (want * 1.2e-7).max(1.5e-45);
                assert!(
                    (f64::from(got) - want).abs() <= 2.0 * unit,
                    "exp({x}): {got} against {want}"
                );
            }
            x += 0.0137;
        }
        let bits = |x: f32| x.fast_exp::<true>().to_bits();
        assert_eq!(bits(0.0), 1.0_f32.to_bits());
        assert_eq!(bits(f32::NEG_INFINITY), 0);
        assert_eq!(bits(-104.1), 0);
        assert!(f32::NAN.fast_exp::<true>().is_nan());
    }

    #[test]
    fn tanh_is_accurate_also_near_zero() {
        let mut x = 1e-6_f32;
        while x < 20.0 {
            for sign in [1.0, -1.0] {
                let want = f64::from(sign * x).tanh();
                let got = f64::from((sign * x).fast_tanh::<true>());
                assert!(
                    (got - want).abs() <= 6e-7 * want.abs(),
                    "tanh({}): {got} against {want}",
                    sign * x
                );
            }
            x *= 1.013;
        }
    }
}
