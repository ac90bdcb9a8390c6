//! Brokers that coordinate through an API server with the faults of real ones.

mod api_server;
mod cluster;
mod controller;
mod partitions;
mod sessions;
mod watches;
