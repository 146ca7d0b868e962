//! The `process` engine: ranks are processes, and letters go over TCP.
//!
//! Each process has a [`World`] in which only its own mailbox is used: what it posts to another rank goes into a queue that a thread
//! writes to that rank's socket, and a thread for each socket puts what comes into the own mailbox. So the engine itself is that of
//! threads ([`LocalEngine`](super::LocalEngine)): tags, deadlines, the ledger and the way in which a run fails are the same code.
//!
//! A writer with nothing to write says that its rank is alive, and what it did last. A reader that hears nothing for the setting
//! `deadline`, or whose socket is closed before the rank said that it has returned, ends the run: the rank is lost. On a GPU this is the
//! only sign, since a peer that dies gives no error there.
//!
//! Tensors on the processor travel this way too, which is made for tests of launch and faults on one host, not for speed; between
//! GPUs only the few bytes go here that announce what NCCL carries.

mod frame;

use std::io::{self, BufReader, BufWriter};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

pub(crate) use frame::Frame;

use super::World;
use super::ring::short;

/// The longest time between two signs of life; a tenth of the deadline if that is shorter.
const PERIOD: Duration = Duration::from_secs(1);

/// How long a process that ends waits until the others have its last words.
const LINGER: Duration = Duration::from_secs(2);

/// What is to be written to one rank; `None` is the end.
pub(crate) type Queue = Receiver<Option<Frame>>;

/// The sockets of a process to all other ranks, and the threads that serve them. Dropped, it sends what is left and waits a moment
/// until the others have it.
pub(crate) struct Links {
    world: Arc<World>,
    sockets: Vec<TcpStream>,
    threads: Vec<JoinHandle<()>>,
}

impl Links {
    /// Serves the sockets: entry `p` of both lists is for rank `p`, and there is none for this rank.
    ///
    /// # Errors
    /// When the system has no more threads or handles.
    pub(crate) fn start(
        world: &Arc<World>,
        queues: Vec<Option<Queue>>,
        sockets: Vec<Option<TcpStream>>,
    ) -> io::Result<Self> {
        let silence = world.silence();
        let mut links = Self {
            world: Arc::clone(world),
            sockets: Vec::new(),
            threads: Vec::new(),
        };
        for (peer, (queue, socket)) in queues.into_iter().zip(sockets).enumerate() {
            let (Some(queue), Some(socket)) = (queue, socket) else {
                continue;
            };
            socket.set_nodelay(true)?;
            socket.set_read_timeout(Some(silence))?;
            socket.set_write_timeout(Some(silence))?;
            let (input, output) = (socket.try_clone()?, socket.try_clone()?);
            links.sockets.push(socket);
            let world = Arc::clone(&links.world);
            let reader = Builder::new().name(format!("from rank {peer}"));
            links
                .threads
                .push(reader.spawn(move || read(&world, peer, input, silence))?);
            let world = Arc::clone(&links.world);
            let writer = Builder::new().name(format!("to rank {peer}"));
            links
                .threads
                .push(writer.spawn(move || write(&world, &queue, output, silence))?);
        }
        Ok(links)
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.world.hang_up();
        let until = Instant::now() + LINGER;
        while !self.threads.iter().all(JoinHandle::is_finished) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        for socket in &self.sockets {
            let _ = socket.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Writes what is in the queue; if there is nothing, a sign of life. Whatever fails, the reader of the same socket says it.
fn write(world: &World, queue: &Queue, socket: TcpStream, silence: Duration) {
    let period = PERIOD.min(silence / 10);
    let mut output = BufWriter::new(socket);
    loop {
        let frame = match queue.recv_timeout(period) {
            Ok(Some(frame)) => frame,
            Err(RecvTimeoutError::Timeout) => Frame::Beat(world.own_history()),
            Ok(None) | Err(RecvTimeoutError::Disconnected) => break,
        };
        if frame.write(&mut output).is_err() {
            break;
        }
    }
    let _ = output.get_ref().shutdown(Shutdown::Write);
}

fn read(world: &World, peer: usize, socket: TcpStream, silence: Duration) {
    use io::ErrorKind::{InvalidData, TimedOut, WouldBlock};
    let mut input = BufReader::new(socket);
    let end = loop {
        match Frame::read(&mut input) {
            Ok(frame) => world.hear(peer, frame),
            Err(error) => break error,
        }
    };
    let how = match end.kind() {
        WouldBlock | TimedOut => format!(
            "its process has said nothing for {} (it is stopped, or its host is gone)",
            short(silence)
        ),
        InvalidData => format!("its process does not speak as this one does: {end}"),
        _ => "its process ended without a word (it was killed, or has crashed)".to_owned(),
    };
    world.lost(peer, &how);
}
