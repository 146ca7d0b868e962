//! No input makes the analyser panic, hang or run out of stack: it plans, refuses or says that it is no Rust.

#![no_main]

#[path = "../damage.rs"]
mod damage;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let source = damage::source(data);
    // The stack that rustc gives to an attribute, many times over: a sanitizer's frames are larger.
    let thread = std::thread::Builder::new()
        .stack_size(64 << 20)
        .spawn(move || damage::survive(&source));
    if thread.is_ok_and(|thread| thread.join().is_err()) {
        std::process::abort();
    }
});
