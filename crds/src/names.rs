//! The names by which clients know topics.
//!
//! A topic lives in its app's namespace, and one `Cluster` may serve many namespaces, so two teams may both have a Topic `orders`.
//! - A topic in its Cluster's own namespace is called by its own name: `orders`. What comes from Kafka keeps its names, dots
//!   included, and a document means the same to a standalone broker.
//! - A topic of another namespace is called `<namespace>..<name>`: `shop..orders`.
//!
//! Two dots, because then no two topics can ever have one name, with nothing to compare and no one to ask: a namespace has no
//! dots, and `spec.topicName` may not contain `..` (`metadata.name` can't). With one dot the topic `shop.orders` of the Cluster's namespace
//! would clash with `orders` of the namespace `shop`, and to forbid dots would refuse half of the names that people bring from
//! Kafka. `/` would read better, but is not legal in Kafka, whose clients shall be served too. From a name alone follows
//! which namespace's permissions count: see [`split`].

use crate::topic::Topic;

/// Stands between the namespace and the topic's own name.
pub const NAMESPACE_SEPARATOR: &str = "..";

/// The longest legal topic name.
pub(crate) const MAX_TOPIC_NAME: usize = 249;
/// The longest own name of a topic that is called with its namespace, of 63 characters at most.
pub(crate) const MAX_QUALIFIED_TOPIC_NAME: usize = MAX_TOPIC_NAME - 63 - NAMESPACE_SEPARATOR.len();

impl Topic {
    /// The topic's own name, unchecked: `spec.topicName` or `metadata.name`.
    pub fn own_name(&self) -> &str {
        let object = self.metadata.name.as_deref().unwrap_or_default();
        self.spec.topic_name.as_deref().unwrap_or(object)
    }

    /// The name by which clients of a Cluster in this namespace know the topic.
    pub fn client_name(&self, cluster_namespace: &str) -> String {
        match self.metadata.namespace.as_deref() {
            Some(namespace) if namespace != cluster_namespace => {
                format!("{namespace}{NAMESPACE_SEPARATOR}{}", self.own_name())
            }
            _ => self.own_name().to_owned(),
        }
    }
}

/// The namespace in a client's name for a topic, if it is not the Cluster's, and the topic's own name.
pub fn split(client_name: &str) -> (Option<&str>, &str) {
    match client_name.split_once(NAMESPACE_SEPARATOR) {
        Some((namespace, name)) => (Some(namespace), name),
        None => (None, client_name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topic::TopicSpec;

    fn topic(namespace: &str, name: &str, topic_name: Option<&str>) -> Topic {
        let topic_name = topic_name.map(str::to_owned);
        let mut topic = Topic::new(
            name,
            TopicSpec {
                topic_name,
                ..TopicSpec::default()
            },
        );
        topic.metadata.namespace = Some(namespace.to_owned());
        topic
    }

    #[test]
    fn topics_of_different_namespaces_never_have_one_name() {
        let topics = [
            (topic("kafka", "orders", None), "orders"),
            (topic("kafka", "shop.orders", None), "shop.orders"),
            (topic("shop", "orders", None), "shop..orders"),
            (topic("shop", "o", Some("Orders_1")), "shop..Orders_1"),
            (topic("a", "b.c", None), "a..b.c"),
            (topic("kafka", "a.b.c", None), "a.b.c"),
        ];
        for (topic, expected) in topics {
            let name = topic.client_name("kafka");
            assert_eq!(name, expected);
            let namespace = topic.metadata.namespace.as_deref();
            let other = namespace.filter(|namespace| *namespace != "kafka");
            assert_eq!(split(&name), (other, topic.own_name()));
        }
    }

    #[test]
    fn the_longest_names_together_are_legal() {
        let topic = topic(
            &"n".repeat(63),
            "o",
            Some(&"t".repeat(MAX_QUALIFIED_TOPIC_NAME)),
        );
        assert_eq!(topic.client_name("kafka").len(), MAX_TOPIC_NAME);
    }
}
