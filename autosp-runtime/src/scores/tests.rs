//! What may be done to scores, and in which order.
