//! Runs a kernel compiled for the vector instructions of the processor at hand.
//!
//! A [`Job`]'s body is inlined into a function that is compiled for AVX2 and FMA, and into one for the build's own target;
//! the first is taken when the processor has both. The compiler vectorises the loops: there are no intrinsics.

/// Work whose inner loops profit from wide vectors. Implementations mark `run` `#[inline(always)]`.
pub(crate) trait Job {
    type Out;
    /// `FMA` is true when fused multiply-add is an instruction here.
    fn run<const FMA: bool>(self) -> Self::Out;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2<J: Job>(job: J) -> J::Out {
    job.run::<true>()
}

/// Runs `job` with the widest vectors that this processor has.
pub(crate) fn dispatch<J: Job>(job: J) -> J::Out {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        // SAFETY: the processor was just found to have both features that `with_avx2` is compiled for.
        return unsafe { with_avx2(job) };
    }
    job.run::<{ cfg!(target_arch = "aarch64") }>()
}
