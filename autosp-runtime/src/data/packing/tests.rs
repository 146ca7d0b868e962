use proptest::prelude::*;

use super::super::TextReader;
use super::*;

proptest! {
    /// Rows hold pieces of documents side by side, and say where each begins and which tokens are predicted.
    #[test]
    fn packed_rows_say_which_token_is_whose(
        lengths in proptest::collection::vec(1usize..20, 1..10),
        seq_len in 2usize..40,
        step in 0u64..100,
    ) {
        prop_assume!(lengths.iter().any(|&n| n >= seq_len));
        // Token 100 * document + place.
        let documents = lengths.iter().enumerate().map(|(i, &n)| (0..n).map(|j| (100 * (i + 1) + j) as u32).collect::<Vec<_>>());
        let text = TextReader::new().documents(documents).unwrap();
        let batch = text.packed_batch(5, step, 2, seq_len).unwrap();
        let rows = |x: &Tensor| x.to_vec2::<u32>().unwrap();
        let (tokens, positions) = (rows(&batch.tokens), rows(&batch.positions));
        let labels = batch.labels.to_vec2::<i64>().unwrap();
        for row in 0..2 {
            let ids = &batch.documents[row];
            prop_assert_eq!(ids.len(), seq_len);
            for i in 0..seq_len {
                let (token, label) = (tokens[row][i], labels[row][i]);
                let first = i == 0 || ids[i] != ids[i - 1];
                if first {
                    prop_assert_eq!((label, positions[row][i]), (IGNORE, 0));
                } else {
                    prop_assert_eq!(ids[i], ids[i - 1]);
                    prop_assert_eq!(positions[row][i], positions[row][i - 1] + 1);
                }
                if token == 0 {
                    // At most one token is left over.
                    prop_assert!(i + 1 == seq_len && label == IGNORE);
                } else if !first {
                    prop_assert_eq!(label, i64::from(token));
                    prop_assert_eq!(token, tokens[row][i - 1] + 1);
                }
            }
        }
    }
}
