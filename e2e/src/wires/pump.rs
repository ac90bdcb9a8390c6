//! Passing bytes on, both ways, as two links allow.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

use super::Link;

/// Bytes read at a time.
const PIECE: usize = 64 << 10;
/// Pieces under way on a link at most: a sender that is faster than that has to wait, as for a full window.
const PIECES: usize = 64;

/// Passes bytes on until both sides have ended, or one fails, or a link is reset.
pub(super) async fn both(
    mut near: TcpStream,
    mut far: TcpStream,
    there: watch::Receiver<Link>,
    back: watch::Receiver<Link>,
    ended: &Notify,
) {
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let resets = (there.clone(), back.clone());
    let ((mut near_read, mut near_write), (mut far_read, mut far_write)) =
        (near.split(), far.split());
    let pumps = async {
        tokio::join!(
            one_way(&mut near_read, &mut far_write, there, None),
            one_way(&mut far_read, &mut near_write, back, Some(ended))
        )
    };
    let was_reset = tokio::select! {
        _ = pumps => false,
        () = was_reset(resets.0) => true,
        () = was_reset(resets.1) => true,
    };
    if was_reset {
        reset(&near);
        reset(&far);
    }
}

/// Makes the stream's end a reset.
pub(super) fn reset(stream: &TcpStream) {
    let _ = stream.set_zero_linger();
}

/// Returns when the link is not cut.
pub(super) async fn passable(link: &mut watch::Receiver<Link>) {
    // Links live as long as the proxies.
    let _ = link.wait_for(|link| !link.cut).await;
}

async fn was_reset(mut link: watch::Receiver<Link>) {
    let resets = link.borrow().resets;
    let _ = link.wait_for(|link| link.resets != resets).await;
}

async fn one_way(
    from: &mut ReadHalf<'_>,
    to: &mut WriteHalf<'_>,
    link: watch::Receiver<Link>,
    ended: Option<&Notify>,
) {
    let (pieces, mut arriving) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES);
    let mut near_end = link.clone();
    let read = async move {
        loop {
            passable(&mut near_end).await;
            let mut piece = Vec::with_capacity(PIECE);
            match from.read_buf(&mut piece).await {
                Ok(0) | Err(_) => {
                    // Told at once, also while the link is cut.
                    ended.inspect(|ended| ended.notify_one());
                    return;
                }
                Ok(_) => {
                    let due = Instant::now() + near_end.borrow().delay;
                    if pieces.send((due, piece)).await.is_err() {
                        return;
                    }
                }
            }
        }
    };
    let mut far_end = link;
    let write = async move {
        while let Some((due, piece)) = arriving.recv().await {
            tokio::time::sleep_until(due).await;
            // Also what was on its way when the cable was pulled.
            passable(&mut far_end).await;
            let rate = far_end.borrow().bytes_per_second;
            if let Some(rate) = rate {
                let takes = piece.len() as f64 / rate.max(1) as f64;
                tokio::time::sleep(Duration::from_secs_f64(takes)).await;
            }
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
        // The one side's end is the other's, but not while the cable is out.
        passable(&mut far_end).await;
        let _ = to.shutdown().await;
    };
    tokio::join!(read, write);
}
