// Package network joins the machines by cables (veth pairs) to a bridge. The bridge is in the control machine's namespace and not in the
// host's, whose packet filter, if any, would judge what passes; the host itself is joined by a cable of its own.
package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"millrace.dev/e2e/cluster/plan"
)

const bridgeName = "machines"

// Control sets up the control machine's network, and the host's cable to it.
func Control(pid int) error {
	return within(pid, func(control *netlink.Handle) error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName}}
		if err := control.LinkAdd(bridge); err != nil {
			return fmt.Errorf("bridge: %w", err)
		}
		if err := address(control, bridgeName, plan.ControlAddress); err != nil {
			return err
		}
		// So that webhooks and `kubectl proxy` reach pods.
		if err := podRoutes(control, 0); err != nil {
			return err
		}
		if err := cable(control, "host", os.Getpid(), plan.HostLink, nil); err != nil {
			return err
		}
		return within(os.Getpid(), func(host *netlink.Handle) error {
			return address(host, plan.HostLink, plan.HostAddress)
		})
	})
}

// Node sets up a node's network, and its cable.
func Node(controlPid, pid, number int) error {
	return within(controlPid, func(control *netlink.Handle) error {
		// A machine that was killed has a cable until the kernel has cleared up.
		if err := unplug(control, plan.Node(number)); err != nil {
			return err
		}
		// The same after each boot: for a while, the others go on sending to the one that they knew.
		hardware := net.HardwareAddr{2, 0, 10, 213, 0, byte(number)}
		if err := cable(control, plan.Node(number), pid, "eth0", hardware); err != nil {
			return err
		}
		return within(pid, func(node *netlink.Handle) error {
			if err := address(node, "eth0", plan.NodeAddress(number)); err != nil {
				return err
			}
			if err := podRoutes(node, number); err != nil {
				return err
			}
			// Leads nowhere, but what a process on the node itself sends to a Service must have some route before it is rewritten.
			everything := net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
			return node.RouteAdd(&netlink.Route{Dst: &everything, Gw: net.ParseIP(plan.ControlAddress)})
		})
	})
}

// Unhost takes the host's cable away, if it is still there.
func Unhost() error {
	return within(os.Getpid(), func(host *netlink.Handle) error { return unplug(host, plan.HostLink) })
}

// Forward lets a machine pass on packets that are not for it; before it has links, since each takes the settings that it finds. By a program that has entered the machine: which machine's settings
// /proc shows depends on who reads.
func Forward(pid int) error {
	const script = `echo 1 >/proc/sys/net/ipv4/ip_forward
for which in all default; do
  echo 0 >/proc/sys/net/ipv4/conf/$which/send_redirects
  echo 0 >/proc/sys/net/ipv4/conf/$which/rp_filter
done`
	output, err := exec.Command("nsenter", "--target", strconv.Itoa(pid), "--net", "sh", "-ec", script).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, output)
	}
	return nil
}

// within calls action with a handle on the network of the machine that the process belongs to.
func within(pid int, action func(*netlink.Handle) error) error {
	namespace, err := netns.GetFromPid(pid)
	if err != nil {
		return err
	}
	defer namespace.Close()
	handle, err := netlink.NewHandleAt(namespace)
	if err != nil {
		return err
	}
	defer handle.Close()
	return action(handle)
}

// cable makes a pair of links: one end at the bridge, by the machine's name, the other one in the machine, without an address yet.
func cable(control *netlink.Handle, name string, pid int, peer string, hardware net.HardwareAddr) error {
	bridge, err := control.LinkByName(bridgeName)
	if err != nil {
		return err
	}
	pair := &netlink.Veth{
		LinkAttrs:        netlink.LinkAttrs{Name: name, MasterIndex: bridge.Attrs().Index},
		PeerName:         peer,
		PeerNamespace:    netlink.NsPid(pid),
		PeerHardwareAddr: hardware,
	}
	if err := control.LinkAdd(pair); err != nil {
		return fmt.Errorf("cable %s: %w", name, err)
	}
	return control.LinkSetUp(pair)
}

func unplug(handle *netlink.Handle, name string) error {
	for {
		link, err := handle.LinkByName(name)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return nil
		}
		if err != nil {
			return err
		}
		// It may go by itself in the meantime; the next look tells.
		_ = handle.LinkDel(link)
		time.Sleep(10 * time.Millisecond)
	}
}

func address(handle *netlink.Handle, name, ip string) error {
	link, err := handle.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	network := &net.IPNet{IP: net.ParseIP(ip), Mask: net.CIDRMask(plan.PrefixBits, 32)}
	if err := handle.AddrAdd(link, &netlink.Addr{IPNet: network}); err != nil {
		return fmt.Errorf("address %s on %s: %w", ip, name, err)
	}
	if err := handle.LinkSetUp(link); err != nil {
		return err
	}
	if name == plan.HostLink {
		return nil
	}
	loopback, err := handle.LinkByName("lo")
	if err != nil {
		return err
	}
	return handle.LinkSetUp(loopback)
}

// podRoutes leads to the pods of each node but the one of this number, whether it exists yet or not.
func podRoutes(handle *netlink.Handle, own int) error {
	for number := 1; number <= plan.NodesMax; number++ {
		if number == own {
			continue
		}
		if err := handle.RouteAdd(podRoute(number, false)); err != nil {
			return fmt.Errorf("route to the pods of %s: %w", plan.Node(number), err)
		}
	}
	return nil
}

func podRoute(number int, dropped bool) *netlink.Route {
	_, pods, err := net.ParseCIDR(plan.PodRangeOf(number))
	if err != nil {
		panic(err) // the plan is wrong
	}
	if dropped {
		return &netlink.Route{Dst: pods, Type: unix.RTN_BLACKHOLE}
	}
	return &netlink.Route{Dst: pods, Gw: net.ParseIP(plan.NodeAddress(number))}
}
