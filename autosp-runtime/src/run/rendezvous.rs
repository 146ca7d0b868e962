//! How the processes of a launched run find each other: each connects to rank 0, which compares what they are, and tells each where
//! the others are; then each connects to those below it.
//!
//! Everything has to be done within the setting `start_deadline`. Whoever does not know the secret is turned away and counted, so that
//! a stray connection cannot end a run; ranks that know it and do not fit end it, with the same words on all ranks.

pub(super) mod proof;

use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use autosp_plan::{Settings, codes};
use serde_json::{Value, json};

use self::proof::{Asked, Secret, ask, nonce, tell};
use super::launched::Launched;
use crate::comm::list;
use crate::{Error, Result};

/// How often a rank looks whether something has happened.
const PERIOD: Duration = Duration::from_millis(10);

/// How long a connection may take to prove itself.
const PROOF: Duration = Duration::from_secs(10);

/// Connections that may prove themselves at the same time: at least all ranks of a host, and not what somebody else may open.
const UNPROVEN: usize = 256;

/// What all ranks of a run have in common.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    /// The version of this crate.
    version: &'static str,
    /// The program: size and hash of its file.
    program: String,
    /// Names and values.
    settings: Vec<(&'static str, String)>,
    /// Which of the program's runs this is, from 0.
    run: u64,
}

impl Identity {
    pub(super) fn new(settings: &Settings, program: String, run: u64) -> Self {
        let settings = settings.entries();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            program,
            settings: settings
                .map(|(key, value, _)| (key.name, value.to_string()))
                .collect(),
            run,
        }
    }

    /// Each property under the name that messages give it.
    fn properties(&self) -> Vec<(String, String)> {
        let mut all = vec![
            ("version of autosp".to_owned(), self.version.to_owned()),
            ("program".to_owned(), self.program.clone()),
            ("run of the program".to_owned(), self.run.to_string()),
        ];
        let settings = self.settings.iter();
        all.extend(settings.map(|(name, value)| (format!("setting `{name}`"), value.clone())));
        all
    }
}

/// The sockets of the rank that `launched` says to all others; `None` for itself. Returns when all ranks are there.
///
/// # Errors
/// AS0408 if a rank does not come within `limit`, or rank 0 cannot be reached or listen; AS0409 if the ranks are not alike.
pub(super) fn meet(
    launched: &Launched,
    secret: &Secret,
    own: &Identity,
    limit: Duration,
) -> Result<Vec<Option<TcpStream>>> {
    let meeting = Meeting {
        launched,
        secret,
        own,
        limit,
        until: Instant::now() + limit,
    };
    if launched.rank == 0 {
        meeting.gather()
    } else {
        meeting.join()
    }
}

struct Meeting<'a> {
    launched: &'a Launched,
    secret: &'a Secret,
    own: &'a Identity,
    limit: Duration,
    until: Instant,
}

impl Meeting<'_> {
    /// The part of rank 0.
    fn gather(&self) -> Result<Vec<Option<TcpStream>>> {
        let world = self.launched.world;
        let mut door = Door::open(self.listen_for_all()?, self.secret);
        let mut here: Vec<Option<(Asked, String)>> = (0..world).map(|_| None).collect();
        let result = self.wait(&mut door, &mut here, |asked, here| {
            match self.admit(&asked, here) {
                Ok((rank, place)) => Ok(Some((rank, (asked, place)))),
                Err(error) => {
                    // The run fails with the same words there.
                    let _ = asked.answer(self.secret, &refusal(&error));
                    Err(error)
                }
            }
        });
        let result = result.and_then(|()| {
            let session = nonce().map_err(|error| failed(format!("no random numbers: {error}")))?;
            let places = here
                .iter()
                .map(|rank| rank.as_ref().map(|(_, place)| place));
            let places: Vec<_> = places.collect();
            Ok(json!({ "places": places, "session": session }))
        });
        let answer = match &result {
            Ok(answer) => answer.clone(),
            Err(error) => refusal(error),
        };
        let mut sockets = Vec::with_capacity(world);
        for (rank, caller) in here.into_iter().enumerate() {
            let socket = caller.map(|(asked, _)| asked.answer(self.secret, &answer));
            sockets.push(match (socket, &result) {
                (Some(Err(error)), Ok(_)) => return Err(self.gone(rank, &error)),
                (socket, _) => socket.and_then(io::Result::ok),
            });
        }
        result.map(|_| sockets)
    }

    /// Waits until all ranks above this one are in `here`; `take` says which of them a caller is, and `None` for one of another run.
    fn wait<T>(
        &self,
        door: &mut Door,
        here: &mut [Option<T>],
        mut take: impl FnMut(Asked, &[Option<T>]) -> Result<Option<(usize, T)>>,
    ) -> Result<()> {
        let above = self.launched.rank + 1..self.launched.world;
        let mut strangers = 0;
        loop {
            let missing: Vec<usize> = above.clone().filter(|&rank| here[rank].is_none()).collect();
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() >= self.until {
                return Err(self.missing(&missing, strangers));
            }
            let known = match door.next() {
                None => continue,
                Some(Ok(asked)) => take(asked, here)?,
                Some(Err(error)) => {
                    tracing::warn!(%error, "a connection was turned away");
                    None
                }
            };
            match known {
                Some((rank, caller)) => here[rank] = Some(caller),
                None => strangers += 1,
            }
        }
    }

    /// The rank of a caller and where it listens.
    fn admit<T>(&self, asked: &Asked, here: &[Option<T>]) -> Result<(usize, String)> {
        let (hello, world) = (&asked.message, self.launched.world);
        let number = |name: &str| hello[name].as_u64().map(|n| n as usize);
        let (rank, other_world) = (number("rank"), number("world"));
        if other_world != Some(world) {
            let there = other_world.unwrap_or(0);
            return Err(differ(format!(
                "expected {world} ranks, found {there} on rank {}",
                rank.unwrap_or(0)
            )));
        }
        let Some(rank) = rank.filter(|rank| (1..world).contains(rank)) else {
            return Err(differ("expected one rank 0, found two".to_owned()));
        };
        if here[rank].is_some() {
            return Err(differ(format!("expected one rank {rank}, found two")));
        }
        for (name, value) in self.own.properties() {
            let there = hello["properties"][name.as_str()]
                .as_str()
                .unwrap_or("nothing");
            if there != value {
                return Err(differ(format!(
                    "expected the same {name} on all ranks, found {value} on rank 0 and {there} on rank {rank}"
                ))
                .with_help("start every rank from the same build, with the same flags, variables and autosp.toml"));
            }
        }
        let address = asked.stream.peer_addr().map(|address| address.ip());
        let (Ok(address), Some(port)) = (address, number("port")) else {
            return Err(self.gone(rank, &io::ErrorKind::NotConnected.into()));
        };
        if address.is_loopback() && !self.launched.one_host {
            // Only ranks of this host could use it.
            return Err(failed(format!(
                "rank {rank} reaches rank 0 by {address}, which the other hosts cannot use"
            ))
            .with_help("give rank 0's address in the network, not its name: MASTER_ADDR or AUTOSP_RENDEZVOUS"));
        }
        Ok((rank, SocketAddr::new(address, port as u16).to_string()))
    }

    /// The part of every other rank.
    fn join(&self) -> Result<Vec<Option<TcpStream>>> {
        let Launched { rank, world, .. } = *self.launched;
        let mut first = self.reach_rank_0()?;
        // The others reach this rank where rank 0 does.
        let listener = first
            .local_addr()
            .and_then(|own| TcpListener::bind((own.ip(), 0)))
            .and_then(|listener| Ok((listener.local_addr()?.port(), listener)));
        let (port, listener) =
            listener.map_err(|error| failed(format!("rank {rank} cannot listen: {error}")))?;
        let properties: serde_json::Map<String, Value> = self
            .own
            .properties()
            .into_iter()
            .map(|(name, value)| (name, Value::String(value)))
            .collect();
        let hello = json!({ "rank": rank, "world": world, "port": port, "properties": properties });
        let answer = self.say(&mut first, &hello, 0)?;
        let session = answer["session"].as_str().unwrap_or_default();
        let mut sockets: Vec<Option<TcpStream>> = (0..world).map(|_| None).collect();
        sockets[0] = Some(first);
        let place = |peer: usize| answer["places"][peer].as_str().unwrap_or_default();
        for (peer, place_there) in sockets.iter_mut().enumerate().take(rank).skip(1) {
            let mut socket = self.connect(place(peer), peer)?;
            self.say(
                &mut socket,
                &json!({ "rank": rank, "session": session }),
                peer,
            )?;
            *place_there = Some(socket);
        }
        let mut door = Door::open(listener, self.secret);
        self.wait(&mut door, &mut sockets, |asked, _| {
            let peer = asked.message["rank"].as_u64().unwrap_or(0) as usize;
            if asked.message["session"] != session || !(rank + 1..world).contains(&peer) {
                return Ok(None);
            }
            let socket = asked.answer(self.secret, &json!({}));
            let socket = socket.map_err(|error| self.gone(peer, &error))?;
            Ok(Some((peer, socket)))
        })?;
        Ok(sockets)
    }

    /// Says `message` to the rank `peer`; what it answers, which may be why the run fails.
    fn say(&self, socket: &mut TcpStream, message: &Value, peer: usize) -> Result<Value> {
        // Rank 0 answers when all are there, and knows best when to give up.
        let left = self.until.saturating_duration_since(Instant::now()) + PROOF;
        socket
            .set_read_timeout(Some(left))
            .map_err(|error| self.gone(peer, &error))?;
        let answer = tell(socket, self.secret, message).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => failed(format!(
                "rank {} and rank {peer} have another secret",
                self.launched.rank
            ))
            .with_help("export AUTOSP_SECRET, the same on all hosts"),
            _ => self.gone(peer, &error),
        })?;
        match answer.get("error") {
            None => Ok(answer),
            Some(error) => Err(Error::from_json(error).unwrap_or_else(|| {
                failed(format!(
                    "rank {peer} refuses, in words unknown here: {error}"
                ))
            })),
        }
    }

    /// Where rank 0 is found; on one host this is the host itself, whatever its name.
    fn place_of_rank_0(&self) -> Result<SocketAddr> {
        let text = &self.launched.address;
        let port = text
            .rsplit_once(':')
            .and_then(|(_, port)| port.parse().ok());
        if let (true, Some(port)) = (self.launched.one_host, port) {
            return Ok(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port));
        }
        let mut places = text.to_socket_addrs().map_err(|error| {
            failed(format!("cannot find the host of rank 0, `{text}`: {error}"))
        })?;
        places
            .next()
            .ok_or_else(|| failed(format!("the host of rank 0, `{text}`, has no address")))
    }

    fn listen_for_all(&self) -> Result<TcpListener> {
        let place = self.place_of_rank_0()?;
        // A host may know its own name by a loopback address alone.
        let interface = match place.ip() {
            ip if self.launched.one_host || !ip.is_loopback() => ip,
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        TcpListener::bind((interface, place.port())).map_err(|error| {
            failed(format!("rank 0 cannot listen at {interface}:{}: {error}", place.port()))
                .with_help("AUTOSP_RENDEZVOUS=HOST:PORT on all ranks, with an address of rank 0's host and a free port")
        })
    }

    /// A connection to rank 0, which may come later than this rank.
    fn reach_rank_0(&self) -> Result<TcpStream> {
        loop {
            // A name may become known later as well.
            let reached = self.place_of_rank_0().and_then(|place| {
                let left = self.until.saturating_duration_since(Instant::now());
                TcpStream::connect_timeout(&place, left.clamp(PERIOD, PROOF))
                    .map_err(|error| failed(format!("{place}: {error}")))
            });
            match reached {
                Ok(socket) => return Ok(socket),
                Err(error) if Instant::now() + PERIOD * 5 >= self.until => {
                    return Err(error.context(format_args!(
                        "rank {} has not reached rank 0 within {} s",
                        self.launched.rank,
                        self.limit.as_secs_f64()
                    )));
                }
                Err(_) => std::thread::sleep(PERIOD * 5),
            }
        }
    }

    fn connect(&self, place: &str, peer: usize) -> Result<TcpStream> {
        let left = self.until.saturating_duration_since(Instant::now());
        let address: SocketAddr = place.parse().map_err(|_| {
            failed(format!(
                "expected the address of rank {peer}, found `{place}`"
            ))
        })?;
        TcpStream::connect_timeout(&address, left.max(PERIOD))
            .map_err(|error| self.gone(peer, &error))
    }

    fn gone(&self, peer: usize, error: &io::Error) -> Error {
        failed(format!(
            "rank {} lost rank {peer} while the ranks were starting: {error}",
            self.launched.rank
        ))
    }

    fn missing(&self, ranks: &[usize], strangers: usize) -> Error {
        let mut text = format!(
            "rank {} waited {} s for the ranks to start; missing: {}",
            self.launched.rank,
            self.limit.as_secs_f64(),
            list(ranks)
        );
        if strangers > 0 {
            let _ = write!(
                text,
                "; connections turned away, which did not know the secret of this run: {strangers}"
            );
        }
        failed(text).with_help("AUTOSP_START_DEADLINE=900 if the ranks only need longer")
    }
}

/// Where other ranks come in. Each connection proves itself on a thread of its own, so that none holds up the others; there are at
/// most [`UNPROVEN`] at a time, and further ones wait in the system's queue.
struct Door<'a> {
    listener: TcpListener,
    secret: &'a Secret,
    sender: Sender<io::Result<Asked>>,
    callers: Receiver<io::Result<Asked>>,
    unproven: usize,
}

impl<'a> Door<'a> {
    fn open(listener: TcpListener, secret: &'a Secret) -> Self {
        let (sender, callers) = channel();
        Self {
            listener,
            secret,
            sender,
            callers,
            unproven: 0,
        }
    }

    /// Who has proven itself, or why somebody could not; `None` if nobody has within [`PERIOD`].
    fn next(&mut self) -> Option<io::Result<Asked>> {
        while self.unproven < UNPROVEN {
            match self.accept() {
                Ok(()) => self.unproven += 1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // What was wrong with this connection or is with the system may be over with the next.
                Err(error) => {
                    std::thread::sleep(PERIOD);
                    return Some(Err(error));
                }
            }
        }
        let caller = self.callers.recv_timeout(PERIOD).ok()?;
        self.unproven -= 1;
        Some(caller)
    }

    /// Lets one connection prove itself.
    fn accept(&self) -> io::Result<()> {
        self.listener.set_nonblocking(true)?;
        let (stream, _) = self.listener.accept()?;
        let (secret, sender) = (self.secret.clone(), self.sender.clone());
        let prove = move || {
            let prepared = stream
                .set_nonblocking(false)
                .and_then(|()| stream.set_read_timeout(Some(PROOF)));
            // Nobody listens any more when all are there.
            let _ = sender.send(prepared.and_then(|()| ask(stream, &secret)));
        };
        Builder::new().spawn(prove).map(drop)
    }
}

/// How rank 0 says that the run fails.
fn refusal(error: &Error) -> Value {
    json!({ "error": error.to_json() })
}

fn failed(text: String) -> Error {
    Error::new(codes::RENDEZVOUS, text)
}

fn differ(text: String) -> Error {
    Error::new(codes::RANKS_DIFFER, text)
}

#[cfg(test)]
pub(in crate::run) mod tests;
