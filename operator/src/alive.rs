//! Which replicas of a partition are in sync and alive: pure. Its Lease alone does not say so. The ISR never shrinks below `minInSyncReplicas`, since it
//! names all who may lead (the ISR and the ELR of KIP-966 in one); and with no broker alive, no one is left to take a leader out.

use std::collections::BTreeMap;

use millrace_crds::coordination::PartitionAssignment;
use uuid::Uuid;

/// The brokers of a Cluster that are alive, and what is on their volumes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Alive(pub(crate) BTreeMap<i32, Uuid>);

impl Alive {
    /// Who leads the partition. As long as a broker is alive, one is controller and takes out leaders that are not.
    pub(crate) fn leader(&self, assignment: &PartitionAssignment) -> Option<i32> {
        let leader = assignment.leader.filter(|_| !self.0.is_empty())?;
        Some(leader.id)
    }

    /// The brokers that are in sync.
    pub(crate) fn in_sync(&self, assignment: &PartitionAssignment) -> Vec<i32> {
        let isr = assignment.isr.iter();
        isr.filter(|replica| self.0.get(&replica.id) == Some(&replica.store))
            .map(|replica| replica.id)
            .collect()
    }

    /// The brokers that may lead once they are back. One that is alive without what it held is none of them.
    pub(crate) fn eligible(&self, assignment: &PartitionAssignment) -> Vec<i32> {
        let isr = assignment.isr.iter().map(|replica| replica.id);
        isr.filter(|id| !self.0.contains_key(id)).collect()
    }
}

#[cfg(test)]
mod tests {
    use millrace_crds::coordination::{Leader, Replica};

    use super::*;

    #[test]
    fn who_is_in_sync_is_alive_and_has_its_volume() {
        let (kept, lost) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let mut assignment = PartitionAssignment::new(Uuid::nil(), 0, vec![0, 1, 2]);
        assignment.isr = [0, 1].map(|id| Replica { id, store: kept }).to_vec();
        let (id, broker_epoch) = (0, 1);
        assignment.leader = Some(Leader { id, broker_epoch });
        for (alive, leader, in_sync, eligible) in [
            (
                &[(0, kept), (1, kept), (2, kept)][..],
                Some(0),
                &[0, 1][..],
                &[][..],
            ),
            (&[(0, kept), (2, kept)], Some(0), &[0], &[1]),
            (&[(0, kept), (1, lost), (2, kept)], Some(0), &[0], &[]),
            // Whoever is controller takes the leader out, if it is gone.
            (&[(2, kept)], Some(0), &[], &[0, 1]),
            (&[], None, &[], &[0, 1]),
        ] {
            let alive = Alive(alive.iter().copied().collect());
            let found = (
                alive.leader(&assignment),
                alive.in_sync(&assignment),
                alive.eligible(&assignment),
            );
            assert_eq!(
                found,
                (leader, in_sync.to_vec(), eligible.to_vec()),
                "{alive:?}"
            );
        }
    }
}
