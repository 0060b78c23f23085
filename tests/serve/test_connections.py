"""Connections that are used again."""

import http.client
import time


def test_a_client_that_was_idle_for_longer_than_most_keep_a_connection_gets_an_answer(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    for pause in (0, 6):
        time.sleep(pause)
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (200, True)
    connection.close()
