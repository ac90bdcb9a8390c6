//! What partitions tell the session of a follower: that there is something to send.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// What there is to tell, the more urgent last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum News {
    /// Only the high watermark rose: it can wait for company.
    HighWatermark,
    /// The log grew.
    Appended,
    /// The partition is no longer led in the epoch.
    Changed,
}

/// Gathers the partitions with news, by handle, and wakes the session.
#[derive(Debug, Default)]
pub struct SessionSignal {
    news: Mutex<BTreeMap<u32, News>>,
    wake: Notify,
}

impl SessionSignal {
    /// There is news of a partition.
    pub fn mark(&self, handle: u32, news: News) {
        let mut all = self.news.lock();
        let known = all.entry(handle).or_insert(news);
        *known = news.max(*known);
        drop(all);
        if news > News::HighWatermark {
            self.wake.notify_one();
        }
    }

    /// Takes the news.
    pub fn take(&self) -> BTreeMap<u32, News> {
        std::mem::take(&mut *self.news.lock())
    }

    /// Waits for news that can't wait.
    pub async fn urgent(&self) {
        self.wake.notified().await;
    }
}
