//! Transactions: finds the shard of a transactional id on this broker.

use std::sync::Arc;

use millrace_proto::v1::{
    AddOffsetsRequest, AddOffsetsResponse, AddPartitionsRequest, AddPartitionsResponse,
    EndTransactionRequest, EndTransactionResponse, InitTransactionsRequest,
    InitTransactionsResponse, ListTransactionsRequest, ListTransactionsResponse,
    transaction_service_server::TransactionService,
};
use tonic::{Request, Response, Status};

use super::{Broker, MAX_PARTITIONS_PER_REQUEST, error::ApiError, producer::check_partition_count};
use crate::{
    observe::Method,
    shards::Reply,
    transactions::{self, TransactionError},
};

/// The transaction service.
pub(super) struct Transaction {
    pub(super) broker: Arc<Broker>,
}

impl Transaction {
    async fn ask<T>(
        &self,
        id: &str,
        request: impl FnOnce(Reply<T, TransactionError>) -> transactions::Request,
    ) -> Result<T, ApiError> {
        let shards = &self.broker.transactions;
        self.broker
            .ask_shard(shards, ("transactional id", id), request)
            .await
    }
}

#[tonic::async_trait]
impl TransactionService for Transaction {
    async fn init_transactions(
        &self,
        request: Request<InitTransactionsRequest>,
    ) -> Result<Response<InitTransactionsResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::InitTransactions);
        let request = request.into_inner();
        let id = request.transactional_id.clone();
        let asked = self.ask(&id, |reply| transactions::Request::Init(request, reply));
        let (producer_id, epoch) = asked.await?;
        Ok(Response::new(InitTransactionsResponse {
            producer_id,
            producer_epoch: epoch.into(),
        }))
    }

    async fn add_partitions(
        &self,
        request: Request<AddPartitionsRequest>,
    ) -> Result<Response<AddPartitionsResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::AddPartitions);
        let request = request.into_inner();
        let partitions = request.partitions.iter();
        check_partition_count(partitions.map(|topic| topic.partitions.len()).sum())?;
        for topic in &request.partitions {
            for partition in &topic.partitions {
                self.broker.check_writable(&topic.topic, *partition)?;
            }
        }
        let id = request.transactional_id.clone();
        let add = |reply| transactions::Request::AddPartitions(request, reply);
        self.ask(&id, add).await??;
        Ok(Response::new(AddPartitionsResponse {}))
    }

    async fn add_offsets(
        &self,
        request: Request<AddOffsetsRequest>,
    ) -> Result<Response<AddOffsetsResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::AddOffsets);
        let request = request.into_inner();
        let offsets = request.offsets.as_ref();
        let offsets = offsets.ok_or_else(|| ApiError::invalid("offsets", "there are none"))?;
        if offsets.group_id.is_empty() || offsets.group_id.len() > 255 {
            let message = "a group's name has from 1 to 255 bytes";
            return Err(ApiError::invalid("group_id", message).into());
        }
        if offsets.offsets.len() > MAX_PARTITIONS_PER_REQUEST {
            let message = format!("at most {MAX_PARTITIONS_PER_REQUEST} in one request");
            return Err(ApiError::invalid("offsets", message).into());
        }
        let id = request.transactional_id.clone();
        let add = |reply| transactions::Request::AddOffsets(request, reply);
        self.ask(&id, add).await??;
        Ok(Response::new(AddOffsetsResponse {}))
    }

    async fn end_transaction(
        &self,
        request: Request<EndTransactionRequest>,
    ) -> Result<Response<EndTransactionResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::EndTransaction);
        let request = request.into_inner();
        let id = request.transactional_id.clone();
        let asked = self.ask(&id, |reply| transactions::Request::End(request, reply));
        let (producer_id, epoch) = asked.await?;
        Ok(Response::new(EndTransactionResponse {
            producer_id,
            producer_epoch: epoch.into(),
        }))
    }

    async fn list_transactions(
        &self,
        _request: Request<ListTransactionsRequest>,
    ) -> Result<Response<ListTransactionsResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::ListTransactions);
        let lists = self
            .broker
            .transactions
            .ask_all(transactions::Request::List);
        let mut transactions = lists.await.concat();
        transactions.sort_by(|a, b| a.transactional_id.cmp(&b.transactional_id));
        Ok(Response::new(ListTransactionsResponse { transactions }))
    }
}
