//! What the launcher asks of the system, and the standard library does not offer.

use std::process::Command;

/// What has become of a child process since it was last looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// Nothing.
    None,
    /// It ended with this exit code.
    Exited(i32),
    /// It was killed by this signal.
    Killed(i32),
    /// It was stopped by this signal, and is still there.
    Stopped(i32),
}

/// Looks at a child of this process, which nobody else waits for.
pub(super) fn look(child: i32) -> News {
    let mut status = 0;
    // SAFETY: the call writes one number, and touches no process but a child of this one.
    let found = unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG | libc::WUNTRACED) };
    match found {
        0 => News::None,
        // There is no such child: it has ended, and somebody else knows how.
        n if n < 0 => News::Exited(1),
        _ if libc::WIFEXITED(status) => News::Exited(libc::WEXITSTATUS(status)),
        _ if libc::WIFSIGNALED(status) => News::Killed(libc::WTERMSIG(status)),
        _ if libc::WIFSTOPPED(status) => News::Stopped(libc::WSTOPSIG(status)),
        _ => News::None,
    }
}

/// Sends a signal to the process group that `leader` was started in: to it and what it has started.
pub(super) fn kill_group(leader: i32, signal: i32) {
    // SAFETY: the call takes two numbers; a group that has ended is no error of ours.
    unsafe { libc::killpg(leader, signal) };
}

/// Has the kernel kill the process when the launcher ends, however that happens; where the system can.
pub(super) fn end_with_launcher(command: &mut Command) {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::process::CommandExt;
        // SAFETY: between fork and exec one system call is made, which takes two numbers.
        unsafe {
            command.pre_exec(|| {
                match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = command;
}

/// The name of a signal, as people know it.
pub(super) fn name(signal: i32) -> String {
    let known = match signal {
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGKILL => "SIGKILL",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGSTOP => "SIGSTOP",
        libc::SIGTERM => "SIGTERM",
        libc::SIGTSTP => "SIGTSTP",
        libc::SIGTTIN => "SIGTTIN",
        libc::SIGTTOU => "SIGTTOU",
        _ => return format!("signal {signal}"),
    };
    known.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_becomes_of_a_child_is_seen() {
        let wait = |child: i32| loop {
            match look(child) {
                News::None => std::thread::sleep(std::time::Duration::from_millis(5)),
                news => return news,
            }
        };
        let shell = |text: &str| Command::new("sh").args(["-c", text]).spawn().unwrap().id() as i32;
        assert_eq!(wait(shell("exit 3")), News::Exited(3));
        let child = shell("kill -STOP $$; exit 4");
        assert_eq!(wait(child), News::Stopped(libc::SIGSTOP));
        assert_eq!(look(child), News::None, "said once");
        // SAFETY: the call takes two numbers, and the process is ours.
        unsafe { libc::kill(child, libc::SIGKILL) };
        assert_eq!(wait(child), News::Killed(libc::SIGKILL));
        assert_eq!(look(child), News::Exited(1), "there is no such child");
    }
}
