//! Free TCP ports on 127.0.0.1.
//!
//! They lie below the range from which the system takes the ports of outgoing connections: a broker that was killed must get its
//! port again, although other tests open connections meanwhile.

use std::{collections::BTreeSet, net::TcpListener, ops::Range, sync::Mutex};

const RANGE: Range<u16> = 12_000..31_000;

static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// A port that nothing listens on and that this process has not given out yet.
///
/// # Panics
/// If there is none.
pub fn free_port() -> u16 {
    let mut given = GIVEN.lock().expect("no test panics while it holds this");
    for _ in 0..1_000 {
        let port = fastrand::u16(RANGE);
        if !given.contains(&port) && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            given.insert(port);
            return port;
        }
    }
    panic!("no free port in {RANGE:?}");
}
