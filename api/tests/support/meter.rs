//! What a host that runs nothing tells of what is taken.

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use api::domain::{
    CardUsage, GuestUsage, HostError, HostHealth, HostUsage, MeterHost, ResizeRequest, SandboxId,
    SandboxUsage, VmmUsage, VmmVersion,
};
use async_trait::async_trait;

use super::FakeHost;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// What is told the next time.
pub struct FakeMeter {
    pub vmm: Mutex<VmmUsage>,
    pub guest: Mutex<GuestUsage>,
    /// Of sandboxes with a network card.
    pub card: Mutex<Option<CardUsage>>,
    pub host: Mutex<HostUsage>,
    pub health: Mutex<HostHealth>,
    /// The agent does not answer.
    pub is_silent: Mutex<bool>,
    /// What running sandboxes were to have, in order.
    pub resizes: Mutex<Vec<ResizeRequest>>,
    /// What the next one of these fails with.
    pub resize_fault: Mutex<Option<HostError>>,
    /// Whether processor time can be limited.
    pub limits_cpu: AtomicBool,
}

impl Default for FakeMeter {
    fn default() -> Self {
        Self {
            vmm: Mutex::new(VmmUsage {
                cpu_us: 3_000_000,
                age_us: 10_000_000,
                memory_bytes: 100 * MIB,
                disk_bytes: 3 * MIB,
            }),
            guest: Mutex::new(GuestUsage {
                cpus: 2,
                memory_total: 480 * MIB,
                memory_available: 360 * MIB,
                disk_total: 10 * GIB,
                disk_used: 2 * GIB + GIB / 2,
                disk_available: 7 * GIB + GIB / 2,
            }),
            card: Mutex::new(Some(CardUsage {
                received_bytes: 1000,
                received_frames: 10,
                sent_bytes: 2000,
                sent_frames: 20,
            })),
            host: Mutex::new(HostUsage {
                cpus: 8,
                cpu_busy_us: 20_000_000,
                cpu_total_us: 80_000_000,
                memory_total: 32 * GIB,
                memory_available: 16 * GIB,
                disk_total: 500 * GIB,
                disk_used: 200 * GIB,
                disk_available: 200 * GIB,
            }),
            health: Mutex::new(HostHealth {
                vmm: Ok(VmmVersion {
                    build: "vmm 0.1.0".into(),
                    api: "54.0".into(),
                }),
                network: Some(Ok(())),
                disk: Ok(()),
                images: Ok(()),
            }),
            is_silent: Mutex::new(false),
            resizes: Mutex::default(),
            resize_fault: Mutex::default(),
            limits_cpu: AtomicBool::new(true),
        }
    }
}

impl FakeMeter {
    pub fn resize(&self, request: ResizeRequest) -> Result<(), HostError> {
        if let Some(fault) = self.resize_fault.lock().unwrap().take() {
            return Err(fault);
        }
        self.resizes.lock().unwrap().push(request);
        Ok(())
    }
}

#[async_trait]
impl MeterHost for FakeHost {
    async fn host_usage(&self) -> Result<HostUsage, HostError> {
        Ok(*self.meter.host.lock().unwrap())
    }

    async fn vmm_usages(&self) -> Result<Vec<(SandboxId, VmmUsage)>, HostError> {
        let usage = *self.meter.vmm.lock().unwrap();
        let sandboxes = self.sandboxes.lock().unwrap();
        Ok(sandboxes.iter().map(|id| (id.clone(), usage)).collect())
    }

    async fn sandbox_usage(&self, id: &SandboxId) -> Result<SandboxUsage, HostError> {
        if !self.sandboxes.lock().unwrap().contains(id) {
            return Err(HostError::NotRunning { id: id.clone() });
        }
        if *self.meter.is_silent.lock().unwrap() {
            return Err(HostError::AgentUnreachable {
                reason: "it did not answer within 3 s".into(),
            });
        }
        Ok(SandboxUsage {
            vmm: *self.meter.vmm.lock().unwrap(),
            guest: *self.meter.guest.lock().unwrap(),
            card: *self.meter.card.lock().unwrap(),
            disk_size: 12 * GIB,
        })
    }

    async fn health(&self) -> HostHealth {
        self.meter.health.lock().unwrap().clone()
    }
}
