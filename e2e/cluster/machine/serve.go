package machine

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
)

// ReadDescription reads what Boot wrote, in the working folder.
func ReadDescription() (Description, error) {
	var description Description
	encoded, err := os.ReadFile(descriptionFile)
	if err != nil {
		return description, err
	}
	return description, json.Unmarshal(encoded, &description)
}

// Listen makes the socket, in the working folder.
func Listen() (net.Listener, error) { return net.Listen("unix", socketFile) }

// Serve answers requests, for ever.
func Serve(listener net.Listener, services *Services) error {
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer connection.Close()
			var request Request
			if err := json.NewDecoder(connection).Decode(&request); err != nil {
				return
			}
			_ = json.NewEncoder(connection).Encode(answer(request, services))
		}()
	}
}

func answer(request Request, services *Services) Reply {
	var err error
	switch {
	case request.Start != nil:
		err = services.Start(*request.Start)
	case request.Kill != "":
		err = services.Kill(request.Kill)
	}
	reply := Reply{Services: services.States()}
	if err != nil {
		reply.Error = fmt.Sprint(err)
	}
	return reply
}
