//! Sources that are nested so deeply that a parser would run out of stack are turned away before it sees them.

use proc_macro2::{Delimiter, Span, TokenStream, TokenTree};

/// Brackets inside brackets; candle's own sources stay below 20.
const BRACKETS: usize = 32;
/// Tokens without a separator between them, added up from the outermost bracket to the innermost: a bound of how deep chains
/// such as `a.b().c()` or `!!!x` and brackets can nest together. Candle's own sources stay below 500.
const TOKENS: usize = 700;

/// Where a source nests too deeply.
pub(crate) fn too_deep(tokens: TokenStream) -> Option<Span> {
    // (what is left of a bracket, tokens before it on the way down, tokens since the last separator)
    let mut open = vec![(tokens.into_iter().peekable(), 0, 0)];
    // `<` that no `>` has closed, since the last separator.
    let mut angles = 0_usize;
    while let Some((rest, before, run)) = open.last_mut() {
        let Some(token) = rest.next() else {
            open.pop();
            continue;
        };
        *run += 1;
        if *before + *run > TOKENS {
            return Some(token.span());
        }
        match token {
            TokenTree::Punct(p) if matches!(p.as_char(), ';' | ',') => {
                *run = 0;
                angles = 0;
            }
            TokenTree::Punct(p) if p.as_char() == '<' => {
                angles += 1;
                if angles > BRACKETS {
                    return Some(p.span());
                }
            }
            TokenTree::Punct(p) if p.as_char() == '>' => angles = angles.saturating_sub(1),
            TokenTree::Group(group) => {
                let inside = *before + *run;
                // A block ends a statement, unless something goes on after it.
                let goes_on = match rest.peek() {
                    Some(TokenTree::Ident(i)) => i == "else" || i == "as",
                    Some(TokenTree::Punct(p)) => p.as_char() != '#',
                    Some(TokenTree::Group(_)) => true,
                    _ => false,
                };
                if group.delimiter() == Delimiter::Brace && !goes_on {
                    *run = 0;
                }
                if open.len() > BRACKETS {
                    return Some(group.span());
                }
                open.push((group.stream().into_iter().peekable(), inside, 0));
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deep(source: &str) -> bool {
        too_deep(source.parse().expect("tokens")).is_some()
    }

    #[test]
    fn brackets_and_chains_are_counted_and_statements_are_not() {
        let nested = |n: usize| format!("fn f() {{ {}x{} }}", "(".repeat(n), ")".repeat(n));
        assert!(!deep(&nested(20)) && deep(&nested(200)) && deep(&nested(100_000)));
        for (link, before, after) in [
            ("!", "", "x"),
            (".t()", "x", ""),
            ("+ x", "x", ""),
            ("if a {} else ", "", "{}"),
            ("|a| ", "", "x"),
            ("&", "let a: ", "T = b"),
        ] {
            let chain = |n: usize| format!("fn f() {{ {before}{}{after} }}", link.repeat(n));
            assert!(!deep(&chain(100)) && deep(&chain(20_000)), "{link}");
        }
        assert!(!deep(
            &"fn f(a: A) -> B { g(a, 1); if a { b } c }".repeat(5_000)
        ));
        assert!(!deep(&format!(
            "fn f() {{ {} }}",
            "x = y.t()?; ".repeat(5_000)
        )));
        let types = |n: usize| format!("type T = {}u8{};", "Vec<".repeat(n), ">".repeat(n));
        assert!(!deep(&types(30)) && deep(&types(300)));
    }
}
