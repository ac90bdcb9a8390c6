//! The figures that statuses show: pure. They change seldom enough that writing them is no load, however fast topics grow.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::TopicFigures;

/// No status is written more often than this for figures alone.
const PAUSE: Duration = Duration::from_secs(60);

/// What is shown of each topic that there is.
#[derive(Default)]
pub(crate) struct Figures {
    topics: HashMap<Uuid, Shown>,
}

#[derive(Default)]
struct Shown {
    figures: Arc<TopicFigures>,
    /// When it was last changed.
    changed: Option<Instant>,
}

impl Figures {
    /// Takes in what brokers told at that time of each topic that there is; those that it lacks are forgotten. Answers the topics whose statuses
    /// are to be looked at.
    pub(super) fn take_in(&mut self, told: HashMap<Uuid, TopicFigures>, now: Instant) -> Vec<Uuid> {
        let mut before = std::mem::take(&mut self.topics);
        let mut changed = Vec::new();
        for (id, figures) in told {
            let known = before.remove(&id);
            // Its status may show what an operator before this one was told.
            let new = known.is_none();
            let mut shown = known.unwrap_or_default();
            let paused = shown
                .changed
                .is_some_and(|changed| now.duration_since(changed) < PAUSE);
            let differs = *shown.figures != figures;
            if differs && !paused {
                shown.figures = Arc::new(figures);
                shown.changed = Some(now);
            }
            if new || (differs && !paused) {
                changed.push(id);
            }
            self.topics.insert(id, shown);
        }
        changed
    }

    /// What is to be shown of a topic. None: the brokers have not been asked yet, and what its status shows may stay.
    pub(crate) fn of(&self, topic_id: Uuid) -> Option<Arc<TopicFigures>> {
        self.topics
            .get(&topic_id)
            .map(|shown| shown.figures.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Figure;
    use super::*;

    const TOPIC: Uuid = Uuid::from_u128(7);

    /// None: no broker told anything of the topic.
    fn told(high_watermark: Option<i64>) -> HashMap<Uuid, TopicFigures> {
        let figure = high_watermark.map(|high_watermark| Figure {
            leader_epoch: 1,
            log_start_offset: 0,
            high_watermark,
            size_bytes: 1,
        });
        let figures = figure.map(|figure| (0, figure)).into_iter().collect();
        HashMap::from([(TOPIC, figures)])
    }

    fn shown(figures: &Figures) -> Option<Option<i64>> {
        let of = figures.of(TOPIC)?;
        Some(of.get(&0).map(|figure| figure.high_watermark))
    }

    #[test]
    fn what_is_shown_changes_once_a_minute_at_most_and_not_at_all_at_rest() {
        let begun = Instant::now();
        let mut figures = Figures::default();
        assert_eq!(shown(&figures), None);
        for (second, high_watermark, look, expected) in [
            (0, None, true, None),
            (30, Some(1), true, Some(1)),
            (60, Some(2), false, Some(1)),
            (90, Some(3), true, Some(3)),
            (120, Some(3), false, Some(3)),
            (600, Some(3), false, Some(3)),
            // The broker can't be reached, and what it said goes.
            (630, None, true, None),
            (660, Some(4), false, None),
            (690, Some(4), true, Some(4)),
            (720, None, false, Some(4)),
            (750, None, true, None),
        ] {
            let now = begun + Duration::from_secs(second);
            let changed = figures.take_in(told(high_watermark), now);
            assert_eq!(changed == [TOPIC], look, "second {second}");
            assert_eq!(shown(&figures), Some(expected), "second {second}");
        }
    }

    #[test]
    fn a_topic_that_is_gone_is_forgotten() {
        let mut figures = Figures::default();
        figures.take_in(told(Some(1)), Instant::now());
        let changed = figures.take_in(HashMap::new(), Instant::now());
        assert!(changed.is_empty());
        assert!(figures.topics.is_empty());
    }
}
