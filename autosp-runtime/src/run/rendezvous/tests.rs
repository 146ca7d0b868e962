//! Ranks that find each other, and every way in which they do not: always an error that says who, within the time given.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use super::*;
use crate::run::launched::tests::launched_as;

const SECRET: &str = "a secret of these tests";

/// A free place on this host.
pub(in crate::run) fn place() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn identity(settings: &Settings) -> Identity {
    Identity::new(settings, "program x".to_owned(), 0)
}

type Met = Result<Vec<Option<TcpStream>>>;

/// What each of `ranks` finds in a world of `world`; `change` says how it differs from the others.
fn on(
    world: usize,
    ranks: &[usize],
    limit: Duration,
    change: impl Fn(usize, &mut Launched, &mut Identity, &mut Secret) + Sync,
) -> Vec<Met> {
    let (place, change) = (place(), &change);
    std::thread::scope(|threads| {
        let all: Vec<_> = ranks
            .iter()
            .enumerate()
            .map(|(index, &rank)| {
                let place = place.clone();
                threads.spawn(move || {
                    let mut launched = launched_as(rank, world, &place);
                    let mut own = identity(&Settings::default().with_sp(world));
                    let mut secret = Secret::new(SECRET).unwrap();
                    change(index, &mut launched, &mut own, &mut secret);
                    meet(&launched, &secret, &own, limit)
                })
            })
            .collect();
        all.into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

const LONG: Duration = Duration::from_secs(30);

fn assert_all_say(found: Vec<Met>, code: codes::Code, parts: &[&str]) {
    for (index, met) in found.into_iter().enumerate() {
        let error = met.err().unwrap();
        assert_eq!(error.code(), code, "{error}");
        for part in parts {
            let text = error.to_string();
            assert!(text.contains(part), "{index}: {part} is not in {text}");
        }
    }
}

#[test]
fn every_rank_has_a_socket_to_every_other() {
    for world in [2, 3, 5] {
        let ranks: Vec<usize> = (0..world).rev().collect();
        let mut met = on(world, &ranks, LONG, |_, _, _, _| {});
        met.reverse();
        let mut all: Vec<Vec<Option<TcpStream>>> = met.into_iter().map(Result::unwrap).collect();
        for (from, sockets) in all.iter_mut().enumerate() {
            assert!(sockets[from].is_none());
            for (to, socket) in sockets.iter_mut().enumerate() {
                if let Some(socket) = socket {
                    socket.write_all(&[from as u8, to as u8]).unwrap();
                }
            }
        }
        for (to, sockets) in all.iter_mut().enumerate() {
            for (from, socket) in sockets.iter_mut().enumerate() {
                if let Some(socket) = socket {
                    let mut said = [0; 2];
                    socket.read_exact(&mut said).unwrap();
                    assert_eq!(said, [from as u8, to as u8]);
                }
            }
        }
    }
}

#[test]
fn a_late_rank_is_waited_for() {
    let met = on(3, &[0, 1, 2], LONG, |index, _, _, _| {
        std::thread::sleep(Duration::from_millis([200, 0, 400][index]));
    });
    assert!(met.iter().all(Result::is_ok));
}

#[test]
fn a_missing_rank_is_named_by_all_in_time() {
    let begin = Instant::now();
    let met = on(4, &[0, 2], Duration::from_millis(500), |_, _, _, _| {});
    assert_all_say(
        met,
        codes::RENDEZVOUS,
        &[
            "waited 0.5 s",
            "missing: ranks 1 and 3",
            "AUTOSP_START_DEADLINE",
        ],
    );
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_missing_rank_0_is_named() {
    let met = on(3, &[2], Duration::from_millis(300), |_, _, _, _| {});
    assert_all_say(
        met,
        codes::RENDEZVOUS,
        &["rank 2 has not reached rank 0 within 0.3 s: 127.0.0.1:"],
    );
}

#[test]
fn ranks_that_differ_are_refused_with_both_values() {
    let met = on(3, &[0, 1, 2], LONG, |index, _, own, _| {
        if index == 2 {
            // Rank 1 is there already, and hears it too.
            std::thread::sleep(Duration::from_millis(300));
            *own = identity(&Settings::default().with_sp(3).with_groups(7));
        }
    });
    assert_all_say(
        met,
        codes::RANKS_DIFFER,
        &[
            "the same setting `groups` on all ranks, found 2 on rank 0 and 7 on rank 2",
            "help: start every rank",
        ],
    );
    let settings = Settings::default().with_sp(2);
    let other = |change: &(dyn Fn(&mut Launched, &mut Identity) + Sync), parts: &[&str]| {
        let met = on(2, &[0, 1], LONG, |index, launched, own, _| {
            if index == 1 {
                change(launched, own);
            }
        });
        assert_all_say(met, codes::RANKS_DIFFER, parts);
    };
    let program = |name: &str, run| Identity::new(&settings, name.to_owned(), run);
    other(
        &|_, own| *own = program("program y", 0),
        &["program x on rank 0", "program y on rank 1"],
    );
    other(
        &|_, own| *own = program("program x", 2),
        &["run of the program", "2 on rank 1"],
    );
    other(
        &|launched, _| launched.world = 3,
        &["expected 2 ranks, found 3 on rank 1"],
    );
}

#[test]
fn two_of_one_rank_are_refused() {
    let met = on(3, &[0, 1, 1], LONG, |_, _, _, _| {});
    assert_all_say(
        met,
        codes::RANKS_DIFFER,
        &["expected one rank 1, found two"],
    );
}

#[test]
fn whoever_does_not_know_the_secret_ends_nothing() {
    // Index 1 is a stranger that says to be rank 1; the rank itself comes later.
    let met = on(2, &[0, 1, 1], LONG, |index, _, _, secret| match index {
        1 => *secret = Secret::new("quite another secret").unwrap(),
        2 => std::thread::sleep(Duration::from_millis(300)),
        _ => {}
    });
    let [zero, stranger, one] = <[Met; 3]>::try_from(met).ok().unwrap();
    assert!(zero.is_ok() && one.is_ok());
    let error = stranger.unwrap_err();
    assert_eq!(error.code(), codes::RENDEZVOUS);
    assert!(error.to_string().contains("another secret"), "{error}");
}

#[test]
fn noise_and_silence_end_nothing_and_are_counted() {
    let place = place();
    let launched = launched_as(0, 2, &place);
    let own = identity(&Settings::default().with_sp(2));
    let secret = Secret::new(SECRET).unwrap();
    let error = std::thread::scope(|threads| {
        let zero = threads.spawn(|| meet(&launched, &secret, &own, Duration::from_millis(800)));
        std::thread::sleep(Duration::from_millis(100));
        let silent = TcpStream::connect(&place).unwrap();
        let mut noise = TcpStream::connect(&place).unwrap();
        noise.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let error = zero.join().unwrap().unwrap_err();
        drop(silent);
        error
    });
    let text = error.to_string();
    assert!(text.contains("missing: rank 1"), "{text}");
    assert!(
        text.contains("turned away, which did not know the secret of this run: 1"),
        "{text}"
    );
}

/// A rank that proves itself and answers in words that this version does not know is no welcome.
#[test]
fn a_refusal_in_other_words_is_a_refusal() {
    let place = place();
    let listener = TcpListener::bind(&place).unwrap();
    let secret = Secret::new(SECRET).unwrap();
    let own = identity(&Settings::default().with_sp(2));
    let error = std::thread::scope(|threads| {
        let one = threads.spawn(|| meet(&launched_as(1, 2, &place), &secret, &own, LONG));
        let asked = ask(listener.accept().unwrap().0, &secret).unwrap();
        let answer = json!({ "error": { "code": "AS9999", "message": "something new" } });
        asked.answer(&secret, &answer).unwrap();
        one.join().unwrap().unwrap_err()
    });
    assert_eq!(error.code(), codes::RENDEZVOUS);
    assert!(error.to_string().contains("something new"), "{error}");
}

#[test]
fn a_place_that_is_taken_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = taken.local_addr().unwrap().to_string();
    let own = identity(&Settings::default().with_sp(2));
    let secret = Secret::new(SECRET).unwrap();
    let error = meet(&launched_as(0, 2, &place), &secret, &own, LONG).unwrap_err();
    assert_eq!(error.code(), codes::RENDEZVOUS);
    assert!(error.to_string().contains(&place), "{error}");
    assert!(
        error
            .help()
            .is_some_and(|help| help.contains("AUTOSP_RENDEZVOUS"))
    );
}
