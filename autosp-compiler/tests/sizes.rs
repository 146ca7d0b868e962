//! Sizes that mean the whole sequence wherever a rank would see its shard's: in lists of positions, and against what is not known.

mod common;

use autosp_plan::plan::{Action, Plan};
use common::{edit, llama};

fn plan(source: &str) -> Plan {
    let analysis = autosp_compiler::analyse(source).expect("Rust");
    let refusals: Vec<String> = analysis.refusals.iter().map(|r| r.text(None)).collect();
    assert!(refusals.is_empty(), "{}", refusals.join("\n"));
    analysis.plan
}

/// Lengths of the whole sequence that the model asks for, and tables of which it takes this rank's rows.
fn count(plan: &Plan) -> (usize, usize) {
    let edits = plan.twins.iter().flat_map(|t| &t.edits);
    let (mut valid, mut slices) = (0, 0);
    for edit in edits {
        match edit.action {
            Action::Valid | Action::ValidParts(..) => valid += 1,
            Action::Slice(_) => slices += 1,
            _ => {}
        }
    }
    (valid, slices)
}

const EMBED: &str = "let mut x = self.embed_tokens.forward(x)?;";

fn with(after: &str) -> String {
    edit(&llama(), EMBED, &format!("{EMBED}\n        {after}"))
}

#[test]
fn a_list_of_positions_has_the_whole_length_and_is_cut() {
    let (valid, slices) = count(&plan(&llama()));
    for list in [
        "(0..seq_len as u32).collect::<Vec<u32>>()",
        "(0..seq_len as u32).map(|i| i).collect::<Vec<_>>().as_slice()",
    ] {
        let source = with(&format!(
            "let positions = Tensor::new({list}, x.device())?;\n        x = x.broadcast_add(&self.embed_tokens.forward(&positions)?)?;"
        ));
        let found = count(&plan(&source));
        assert!(found.0 > valid && found.1 > slices, "{list}: {found:?}");
    }
    // A length among given numbers.
    let source = with(
        "let length = Tensor::new(&[1.0, seq_len as f64], x.device())?;\n        x = x.broadcast_mul(&length.sum_all()?)?;",
    );
    let by_count = with(
        "let length = Tensor::new(&[1u32, seq_len as u32], x.device())?;\n        x = x.broadcast_mul(&length.sum_all()?.to_dtype(x.dtype())?)?;",
    );
    for source in [source, by_count] {
        assert!(count(&plan(&source)).0 > valid);
    }
}

#[test]
fn a_length_is_held_whole_against_what_is_not_known() {
    let (valid, _) = count(&plan(&llama()));
    for test in [
        "seq_len > std::env::args().count()",
        "std::env::args().count() <= seq_len",
        "seq_len == limit()",
        "x.dim(1)? != limit()",
    ] {
        let source = with(&format!(
            "if {test} {{\n            x = (x * 2.0)?;\n        }}"
        )) + "\nfn limit() -> usize {\n    std::env::args().count()\n}\n";
        assert!(count(&plan(&source)).0 > valid, "{test}");
    }
}
