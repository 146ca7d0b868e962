//! Proof that both ends of a connection know the secret of the run, which itself never travels.
//!
//! Each end makes a number that is used once; each proves its message by an HMAC with SHA-256 (RFC 2104) over both numbers and the
//! message. What is said afterwards is neither proven nor hidden: the network between the hosts of a run has to be trusted.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use hmac::{Hmac, Mac};
use serde_json::{Value, json};
use sha2::Sha256;

/// What the protocol is called; the number grows when it changes.
const PROTOCOL: &str = "autosp 1";

/// The longest message: a table of 256 ranks' settings is far below.
const MOST_BYTES: u32 = 1 << 20;

/// What only the ranks of one run know.
#[derive(Clone)]
pub(crate) struct Secret(Vec<u8>);

impl Secret {
    /// A secret of at least 16 bytes.
    pub(crate) fn new(text: &str) -> Option<Self> {
        (text.len() >= 16).then(|| Self(text.as_bytes().to_vec()))
    }

    fn mac(&self, from: &str, nonces: [&str; 2], message: &str) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).ok()?;
        for part in [PROTOCOL, from, nonces[0], nonces[1], message] {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part.as_bytes());
        }
        Some(mac)
    }

    fn prove(&self, from: &str, nonces: [&str; 2], message: &str) -> String {
        self.mac(from, nonces, message)
            .map_or_else(String::new, |mac| hex(&mac.finalize().into_bytes()))
    }

    fn holds(&self, from: &str, nonces: [&str; 2], message: &str, proof: &str) -> bool {
        let bytes = unhex(proof);
        let mac = self.mac(from, nonces, message);
        bytes.is_some_and(|bytes| mac.is_some_and(|mac| mac.verify_slice(&bytes).is_ok()))
    }
}

/// A connection on which the other end has proven itself, and to which an answer is owed.
pub(super) struct Asked {
    pub(super) stream: TcpStream,
    pub(super) message: Value,
    nonces: [String; 2],
}

/// Lets whoever has connected prove that it knows the secret: what it says is returned with the connection.
///
/// # Errors
/// When it does not, or says something else; it has been told then.
pub(super) fn ask(mut stream: TcpStream, secret: &Secret) -> io::Result<Asked> {
    let own = nonce()?;
    send(&mut stream, &json!({ "protocol": PROTOCOL, "nonce": own }))?;
    let answer = receive(&mut stream)?;
    let word = |name: &str| answer[name].as_str().unwrap_or_default().to_owned();
    let (other, message) = (word("nonce"), word("message"));
    if !secret.holds("caller", [&own, &other], &message, &word("proof")) {
        let _ = send(&mut stream, &json!({ "refused": "secret" }));
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "another secret",
        ));
    }
    Ok(Asked {
        stream,
        message: serde_json::from_str(&message)?,
        nonces: [own, other],
    })
}

impl Asked {
    /// Answers, with the proof that this end knows the secret as well.
    ///
    /// # Errors
    /// When the other end is gone.
    pub(super) fn answer(mut self, secret: &Secret, message: &Value) -> io::Result<TcpStream> {
        let message = message.to_string();
        let [own, other] = &self.nonces;
        let proof = secret.prove("called", [own, other], &message);
        send(
            &mut self.stream,
            &json!({ "message": message, "proof": proof }),
        )?;
        Ok(self.stream)
    }
}

/// Says `message` to whoever accepts connections at the other end, with proof, and returns what it answers.
///
/// # Errors
/// When the other end is gone or silent; `PermissionDenied` if one of the two does not know the other's secret.
pub(super) fn tell(stream: &mut TcpStream, secret: &Secret, message: &Value) -> io::Result<Value> {
    let hello = receive(stream)?;
    if hello["protocol"] != PROTOCOL {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("expected `{PROTOCOL}`, found {}", hello["protocol"]),
        ));
    }
    let other = hello["nonce"].as_str().unwrap_or_default();
    let (own, message) = (nonce()?, message.to_string());
    let proof = secret.prove("caller", [other, &own], &message);
    send(
        stream,
        &json!({ "nonce": own, "message": message, "proof": proof }),
    )?;
    let answer = receive(stream)?;
    let word = |name: &str| answer[name].as_str().unwrap_or_default();
    if !secret.holds("called", [other, &own], word("message"), word("proof")) {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "another secret",
        ));
    }
    Ok(serde_json::from_str(word("message"))?)
}

fn send(stream: &mut TcpStream, message: &Value) -> io::Result<()> {
    let text = message.to_string();
    let mut bytes = (text.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    stream.write_all(&bytes)
}

fn receive(stream: &mut TcpStream) -> io::Result<Value> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > MOST_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "expected a message of autosp, found something else",
        ));
    }
    let mut bytes = vec![0; length as usize];
    stream.read_exact(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// A number that is used once, in hexadecimal.
pub(super) fn nonce() -> io::Result<String> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(hex(&bytes))
}

fn hex(bytes: &[u8]) -> String {
    let digit = |n: u8| char::from_digit(n.into(), 16).unwrap_or('0');
    let digits = bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]);
    digits.collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn secret(text: &str) -> Secret {
        Secret::new(text).unwrap()
    }

    #[test]
    fn the_mac_is_that_of_rfc_4231() {
        // Test case 2 of RFC 4231.
        let mut mac = Hmac::<Sha256>::new_from_slice(b"Jefe").unwrap();
        mac.update(b"what do ya want for nothing?");
        assert_eq!(
            hex(&mac.finalize().into_bytes()),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }

    #[test]
    fn a_proof_holds_for_one_direction_one_pair_of_numbers_and_one_message() {
        let known = secret("0123456789abcdef");
        let proof = known.prove("caller", ["a", "b"], "hello");
        assert!(known.holds("caller", ["a", "b"], "hello", &proof));
        for (from, nonces, message) in [
            ("called", ["a", "b"], "hello"),
            ("caller", ["b", "a"], "hello"),
            ("caller", ["ab", ""], "hello"),
            ("caller", ["a", "b"], "hullo"),
        ] {
            assert!(!known.holds(from, nonces, message, &proof));
        }
        let other = secret("0123456789abcdeF");
        assert!(!other.holds("caller", ["a", "b"], "hello", &proof));
        assert!(!known.holds("caller", ["a", "b"], "hello", ""));
        assert!(Secret::new("0123456789abcde").is_none());
    }

    /// What both ends find when their secrets are these.
    fn meet(caller: &str, called: &str) -> (io::Result<Value>, io::Result<Value>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let place = listener.local_addr().unwrap();
        let (caller, called) = (secret(caller), secret(called));
        std::thread::scope(|threads| {
            let there = threads.spawn(move || {
                let mut stream = TcpStream::connect(place)?;
                tell(&mut stream, &caller, &json!({ "rank": 3 }))
            });
            let here = ask(listener.accept().unwrap().0, &called).and_then(|asked| {
                let message = asked.message.clone();
                asked.answer(&called, &json!("welcome"))?;
                Ok(message)
            });
            (here, there.join().unwrap())
        })
    }

    #[test]
    fn only_who_knows_the_secret_is_heard() {
        let (here, there) = meet("the very same one", "the very same one");
        assert_eq!(
            (here.unwrap(), there.unwrap()),
            (json!({ "rank": 3 }), json!("welcome"))
        );
        let (here, there) = meet("the very same one", "quite another one");
        assert_eq!(here.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(there.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
}
