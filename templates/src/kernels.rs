//! CUDA kernels, as source text for NVRTC: one module for each element type and width of access.

use std::fmt;

use askama::Template;

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// Brain float, 16 bits.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl Element {
    /// All types.
    pub const ALL: [Self; 3] = [Self::Bf16, Self::F16, Self::F32];

    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// Elements in 16 bytes, the widest access of a thread.
    pub const fn widest(self) -> usize {
        16 / self.bytes()
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        })
    }
}

/// Norms, `SiLU`, rotary positions, cross-entropy, embedding backward, `AdamW`: everything over rows of one type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Template)]
#[template(path = "kernels/rows.cu", escape = "none")]
pub struct Rows {
    /// The type of the elements.
    pub element: Element,
    /// Elements that a thread reads at once.
    pub pack: usize,
    /// Packs of a row that one thread of a norm holds.
    pub steps: usize,
}

/// Copies between tensors of other strides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Template)]
#[template(path = "kernels/copy.cu", escape = "none")]
pub struct Copy {
    /// Bytes that a thread copies at once: 1, 2, 4, 8 or 16.
    pub bytes: usize,
}

impl Copy {
    /// The widths.
    pub const WIDTHS: [usize; 5] = [16, 8, 4, 2, 1];

    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "the form that the template calls"
    )]
    fn unit(&self) -> &'static str {
        match self.bytes {
            16 => "uint4",
            8 => "uint2",
            4 => "unsigned int",
            2 => "unsigned short",
            _ => "unsigned char",
        }
    }
}

/// Every module that a program can ask for, by a name that says which: for compilers that are to see them all.
pub fn all() -> Vec<(String, String)> {
    let mut sources = Vec::new();
    for element in Element::ALL {
        for pack in [element.widest(), 1] {
            for steps in [1, 4] {
                let rows = Rows {
                    element,
                    pack,
                    steps,
                };
                sources.push((format!("rows-{element}-{pack}-{steps}"), rows.to_string()));
            }
        }
    }
    sources.extend(Copy::WIDTHS.map(|bytes| (format!("copy-{bytes}"), Copy { bytes }.to_string())));
    sources
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_for_its_type_and_width_alone() {
        let source = Rows {
            element: Element::F16,
            pack: 8,
            steps: 2,
        }
        .to_string();
        assert!(source.contains("#define PACK 8\n#define STEPS 2\n"));
        assert!(
            source.contains("cvt.f32.f16")
                && !source.contains("bf16.f32")
                && !source.contains("typedef float T")
        );
        assert!(source.contains("extern \"C\" __global__ void norm_forward("));
        assert!(
            Copy { bytes: 16 }
                .to_string()
                .contains("typedef uint4 Unit;")
        );
    }

    #[test]
    fn no_two_modules_share_a_name_or_a_text() {
        let sources = all();
        assert_eq!(sources.len(), 17);
        for (i, (name, text)) in sources.iter().enumerate() {
            assert!(
                sources[..i].iter().all(|(n, t)| n != name && t != text),
                "{name}"
            );
        }
    }
}
