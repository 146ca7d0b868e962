//! Source text from tokens: on one line, with the spaces that a person would write, whoever made the tokens.

use proc_macro2::{Delimiter, Spacing, TokenStream, TokenTree};

/// The source text of a piece of syntax.
pub(crate) fn text(node: &impl quote::ToTokens) -> String {
    let mut printer = Printer {
        out: String::new(),
        space: false,
        operand: false,
        joint: false,
        angles: 0,
    };
    printer.stream(node.to_token_stream());
    printer.out
}

struct Printer {
    out: String,
    /// The next token stands apart.
    space: bool,
    /// An operand was printed last, so that `-` or `&` is binary.
    operand: bool,
    /// The next character belongs to the same operator.
    joint: bool,
    /// Open `::<`.
    angles: usize,
}

impl Printer {
    fn stream(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Ident(i) => self.word(&i.to_string()),
                TokenTree::Literal(l) => self.word(&l.to_string()),
                TokenTree::Punct(p) => self.punct(p.as_char(), p.spacing() == Spacing::Joint),
                TokenTree::Group(g) => self.group(g.delimiter(), g.stream()),
            }
        }
    }

    fn gap(&mut self) {
        if std::mem::take(&mut self.space) && !self.out.is_empty() && !self.out.ends_with(' ') {
            self.out.push(' ');
        }
    }

    fn word(&mut self, word: &str) {
        self.space |= self.operand;
        self.gap();
        self.out.push_str(word);
        self.operand = true;
    }

    fn group(&mut self, delimiter: Delimiter, inner: TokenStream) {
        let (open, close) = match delimiter {
            Delimiter::Parenthesis => ("(", ")"),
            Delimiter::Bracket => ("[", "]"),
            Delimiter::Brace => ("{ ", " }"),
            Delimiter::None => ("", ""),
        };
        self.space |= delimiter == Delimiter::Brace;
        self.gap();
        self.out.push_str(open);
        self.operand = false;
        self.stream(inner);
        self.space = false;
        self.out.push_str(close);
        self.operand = true;
    }

    fn punct(&mut self, c: char, joint: bool) {
        let continues = std::mem::take(&mut self.joint);
        match c {
            '.' | '?' | '!' | '\'' | '#' | '|' | '@' | '$' => {
                // `, ..` and `, |x|`, but `x.y`
                if self.operand {
                    self.space = false;
                }
                self.gap();
                self.out.push(c);
                self.operand = c == '?';
                self.space = false;
            }
            ',' | ';' => {
                self.out.push(c);
                self.space = true;
                self.operand = false;
            }
            ':' => {
                self.out.push(c);
                self.space = !joint && !self.out.ends_with("::");
                self.operand = false;
            }
            '<' if self.out.ends_with("::") => {
                self.out.push(c);
                self.angles += 1;
                self.operand = false;
            }
            '>' if self.angles > 0 => {
                self.out.push(c);
                self.angles -= 1;
                self.operand = true;
            }
            // Prefix: a reference, a negation, a dereference
            '&' | '-' | '*' if !self.operand && !continues => {
                self.gap();
                self.out.push(c);
                self.joint = false;
            }
            _ => {
                // The first character of an operator stands apart from what is before, the last from what follows.
                self.space = !continues;
                self.gap();
                self.out.push(c);
                self.space = !joint;
                self.joint = joint;
                self.operand = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::text;

    #[test]
    fn source_is_printed_as_it_is_written() {
        for source in [
            "q.matmul(&k.t()?)?",
            "(q.matmul(&k.t()?)? / (self.head_dim as f64).sqrt())?",
            "x.i((.., seq_len - 1, ..))?",
            "candle_nn::ops::softmax(&scores, D::Minus1)",
            "Tensor::cat(&[&a, &b], 2)?",
            "x.to_vec2::<u32>()?",
            "a == b && -c <= *d",
            "u8::from(j > i)",
        ] {
            let parsed: syn::Expr = syn::parse_str(source).expect("an expression");
            assert_eq!(text(&parsed), source);
        }
    }
}
