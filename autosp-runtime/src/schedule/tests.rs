//! Schedules with one thing wrong are refused in words.

use candle_core::Result;

use super::{Backward, Forward, Recorder, Schedule, Ulysses};

/// Three groups, the last two of which share a kv head that the second brings.
fn needs() -> Vec<Vec<usize>> {
    vec![vec![0], vec![1], vec![1]]
}

macro_rules! schedule {
    ($name:ident, |$io:ident, $g:ident| $each:block, $end:block) => {
        struct $name;
        impl Schedule<Ulysses> for $name {
            const NAME: &'static str = "m::f";
            fn forward($io: &mut impl Forward) -> Result<()> {
                for $g in 0..$io.groups() {
                    $each
                }
                $end
            }
            fn replay(io: &mut impl Forward) -> Result<()> {
                for g in 0..io.groups() {
                    io.send_qkv(g)?;
                    io.send_out(g)?;
                    io.wait_qkv(g)?;
                }
                io.wait_out()
            }
            fn backward(io: &mut impl Backward) -> Result<()> {
                for g in 0..io.groups() {
                    io.send_grad_out(g)?;
                    io.wait_grad_out(g)?;
                    io.attend_backward(g)?;
                    io.send_grad_qkv(g)?;
                }
                io.wait_grad_qkv()
            }
        }
    };
}

fn refusal<S: Schedule<Ulysses>>() -> String {
    let text = Recorder::forward::<S>(&needs()).unwrap_err().to_string();
    assert!(text.contains("AS0328") && text.contains("`m::f`"), "{text}");
    text
}

macro_rules! refused {
    ($test:ident, $text:literal, |$io:ident, $g:ident| $each:block, $end:block) => {
        #[test]
        fn $test() {
            schedule!(Wrong, |$io, $g| $each, $end);
            let text = refusal::<Wrong>();
            assert!(text.contains($text), "{text}");
        }
    };
}

refused!(
    a_dropped_wait,
    "attend(1) before wait_qkv(1)",
    |io, g| {
        io.send_qkv(g)?;
        if g != 1 {
            io.wait_qkv(g)?;
        }
        io.attend(g)?;
        io.send_out(g)?;
    },
    { io.wait_out() }
);

refused!(
    a_dropped_send,
    "wait_qkv(2) before send_qkv(2)",
    |io, g| {
        if g != 2 {
            io.send_qkv(g)?;
        }
        io.wait_qkv(g)?;
        io.attend(g)?;
        io.send_out(g)?;
    },
    { io.wait_out() }
);

refused!(
    attention_before_the_wait,
    "attend(0) before wait_qkv(0)",
    |io, g| {
        io.send_qkv(g)?;
        io.attend(g)?;
        io.wait_qkv(g)?;
        io.send_out(g)?;
    },
    { io.wait_out() }
);

refused!(
    a_group_attended_twice,
    "attend(0) for a second time",
    |io, g| {
        io.send_qkv(g)?;
        io.wait_qkv(g)?;
        io.attend(g)?;
        io.attend(g)?;
        io.send_out(g)?;
    },
    { io.wait_out() }
);

refused!(
    a_group_left_out,
    "wait_out before send_out(1)",
    |io, g| {
        if g != 1 {
            io.send_qkv(g)?;
            io.wait_qkv(g)?;
            io.attend(g)?;
            io.send_out(g)?;
        }
    },
    { io.wait_out() }
);

refused!(
    an_output_sent_before_it_is_there,
    "send_out(0) before attend(0)",
    |io, g| {
        io.send_qkv(g)?;
        io.wait_qkv(g)?;
        io.send_out(g)?;
    },
    { io.wait_out() }
);

refused!(
    outputs_never_waited_for,
    "wait_out is missing",
    |io, g| {
        io.send_qkv(g)?;
        io.wait_qkv(g)?;
        io.attend(g)?;
        io.send_out(g)?;
    },
    { Ok(()) }
);

refused!(
    a_group_that_is_not_there,
    "send_qkv(3), but the last group is 2",
    |io, g| {
        io.send_qkv(g + 1)?;
    },
    { io.wait_out() }
);

refused!(
    a_shared_kv_head_that_has_not_landed,
    "attend(1) before wait_qkv(2), which brings a kv head",
    |io, g| {
        let other = 2 - g;
        io.send_qkv(other)?;
        if g == 1 {
            io.wait_qkv(1)?;
            io.attend(1)?;
        }
    },
    { io.wait_out() }
);

#[test]
fn a_backward_is_checked_too() {
    struct Wrong;
    impl Schedule<Ulysses> for Wrong {
        const NAME: &'static str = "m::f";
        fn forward(_: &mut impl Forward) -> Result<()> {
            Ok(())
        }
        fn replay(_: &mut impl Forward) -> Result<()> {
            Ok(())
        }
        fn backward(io: &mut impl Backward) -> Result<()> {
            io.send_grad_out(0)?;
            io.attend_backward(0)
        }
    }
    let text = Recorder::backward::<Wrong>(&needs())
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("attend_backward(0) before wait_grad_out(0)"),
        "{text}"
    );
    let text = Recorder::forward::<Wrong>(&needs())
        .unwrap_err()
        .to_string();
    assert!(text.contains("send_qkv(0) is missing"), "{text}");
}

/// A schedule whose replay is wrong in one way.
macro_rules! replay_refused {
    ($test:ident, $text:literal, |$io:ident| $replay:block) => {
        #[test]
        fn $test() {
            struct Wrong;
            impl Schedule<Ulysses> for Wrong {
                const NAME: &'static str = "m::f";
                fn forward(_: &mut impl Forward) -> Result<()> {
                    Ok(())
                }
                fn replay($io: &mut impl Forward) -> Result<()> {
                    $replay
                }
                fn backward(_: &mut impl Backward) -> Result<()> {
                    Ok(())
                }
            }
            let text = Recorder::replay::<Wrong>(&[vec![0]])
                .unwrap_err()
                .to_string();
            assert!(text.contains("AS0328") && text.contains($text), "{text}");
        }
    };
}

replay_refused!(
    a_replay_that_attends,
    "attend(0) in a replay, which has the result",
    |io| {
        io.send_qkv(0)?;
        io.wait_qkv(0)?;
        io.attend(0)
    }
);

replay_refused!(
    a_replay_that_does_not_wait,
    "wait_qkv(0) is missing",
    |io| {
        io.send_qkv(0)?;
        io.send_out(0)?;
        io.wait_out()
    }
);

replay_refused!(
    a_replay_without_its_result,
    "wait_out before send_out(0)",
    |io| {
        io.send_qkv(0)?;
        io.wait_qkv(0)?;
        io.wait_out()
    }
);

replay_refused!(
    a_replay_that_sends_twice,
    "send_out(0) for a second time",
    |io| {
        io.send_out(0)?;
        io.send_out(0)
    }
);

replay_refused!(a_replay_that_does_not_end, "wait_out is missing", |io| {
    io.send_qkv(0)?;
    io.send_out(0)?;
    io.wait_qkv(0)
});

#[test]
fn a_correct_schedule_is_drawn() {
    schedule!(
        Right,
        |io, g| {
            if g == 0 {
                io.send_qkv(0)?;
            }
            if g + 1 < io.groups() {
                io.send_qkv(g + 1)?;
            }
            io.wait_qkv(g)?;
            io.attend(g)?;
            io.send_out(g)?;
        },
        { io.wait_out() }
    );
    let recorder = Recorder::forward::<Right>(&needs()).unwrap();
    let drawn = "\
m::f, forward
  group 0  qkv      s.w
           attend      #
           out          s.......w
  group 1  qkv       s....w
           attend          #
           out              s...w
  group 2  qkv           s...w
           attend             #
           out                 sw
";
    assert_eq!(recorder.to_string(), drawn);
    assert_eq!(
        recorder.verbs()[..4],
        ["send_qkv(0)", "send_qkv(1)", "wait_qkv(0)", "attend(0)"]
    );
    let drawn = "\
m::f, replay
  group 0  qkv      s.w
           out       s.......w
  group 1  qkv         s.w
           out          s....w
  group 2  qkv            s.w
           out             s.w
";
    assert_eq!(
        Recorder::replay::<Right>(&needs()).unwrap().to_string(),
        drawn
    );
    assert!(
        Recorder::backward::<Right>(&needs())
            .unwrap()
            .to_string()
            .contains("m::f, backward")
    );
}
