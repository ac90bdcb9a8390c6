package machine

import (
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"
)

func reaped(t *testing.T) *Services {
	services := NewServices(t.TempDir())
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGCHLD)
	t.Cleanup(func() { signal.Stop(ended); close(ended) })
	go services.Reap(ended)
	return services
}

func state(services *Services) State { return services.States()[0] }

func until(t *testing.T, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not in 10 s")
		}
	}
}

func TestAServiceThatEndsIsStartedAgain(t *testing.T) {
	services := reaped(t)
	if err := services.Start(Service{Name: "short", Args: []string{"sh", "-c", "exit 3"}}); err != nil {
		t.Fatal(err)
	}
	until(t, func() bool { return state(services).Restarts >= 2 })
	if err := services.Kill("short"); err != nil {
		t.Fatal(err)
	}
}

func TestAKilledServiceStaysEndedUntilItIsStarted(t *testing.T) {
	services := reaped(t)
	long := Service{Name: "long", Args: []string{"sleep", "1000"}}
	if err := services.Start(long); err != nil {
		t.Fatal(err)
	}
	first := state(services).Pid
	if err := services.Start(long); err != nil || state(services).Pid != first {
		t.Fatalf("a second start must do nothing: %v, pid %d, before %d", err, state(services).Pid, first)
	}
	if err := services.Kill("long"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(restartPause + 200*time.Millisecond)
	if now := state(services); now.Pid != 0 || now.Restarts != 0 {
		t.Fatalf("it runs: %+v", now)
	}
	if err := services.Start(long); err != nil || state(services).Pid == 0 {
		t.Fatalf("it doesn't run: %v", err)
	}
	if err := services.Kill("long"); err != nil {
		t.Fatal(err)
	}
}
