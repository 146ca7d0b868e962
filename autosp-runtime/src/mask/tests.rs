//! Masks look like candle's tensors and are compared with what they were taken for.
